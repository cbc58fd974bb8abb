"""Settings of tiny models that several adapters share: a change of one goes to all."""

# Latent attention of DeepSeek. How much of a head has no rope, each family says.
LATENT = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16)
# DeepSeek's mixture of experts, all of them in one group.
EXPERTS = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, moe_intermediate_size=32
)
