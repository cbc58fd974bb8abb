"""Hybrids of attention and Mamba: Jamba, Zamba, Bamba, Falcon-H1, Granite 4 and Nemotron-H."""

from flexpatch.registry import CONVOLUTION, FULL, STATE_SPACE, Adapter, LogitTransform, no_mask, register

MAMBA = "linear_attention"
MAMBA_2 = (CONVOLUTION, STATE_SPACE)  # Mamba 1 takes no state to start from
STATE = dict(mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=16)

register(
    Adapter(
        name="Jamba",
        masks="by_layer_type",
        unmasked=(MAMBA,),
        unshared={"JambaMambaMixer": no_mask},
        restarts=False,
        since="5.16",
        tiny={
            "jamba": [dict(attn_layer_period=4, attn_layer_offset=2, num_experts=4, mamba_d_state=8, mamba_dt_rank=8)]
        },
    )
)

register(
    Adapter(
        name="Bamba, Nemotron-H",
        masks="by_layer_type",
        unmasked=(MAMBA, "moe", "mlp"),
        unshared=dict.fromkeys(("BambaMixer", "NemotronHMamba2Mixer"), no_mask),
        branched=dict.fromkeys(("BambaMixer", "NemotronHMamba2Mixer"), MAMBA_2),
        restarts=False,
        since="5.16",
        tiny={
            "bamba": [dict(STATE, attn_layer_indices=[2])],
            "nemotron_h": [
                dict(
                    layers_block_type=[MAMBA, "moe", FULL, MAMBA, "mlp"],
                    ssm_state_size=8,
                    mamba_num_heads=8,
                    mamba_head_dim=16,
                    n_groups=2,
                    chunk_size=16,
                    n_routed_experts=4,
                    num_experts_per_tok=2,
                    moe_intermediate_size=32,
                    moe_shared_expert_intermediate_size=32,
                )
            ],
        },
    )
)


def in_hybrid_layers(config: object) -> dict[str, int | None]:
    """The window rule of a model whose layers with attention have a mixer with a state beside it."""
    return {FULL: None, "hybrid": None}


SHARED = dict(layers_block_type=[MAMBA, MAMBA, "hybrid", MAMBA, "hybrid"], num_hidden_layers=5, n_mamba_heads=2)
SHARED |= dict(num_key_value_heads=4, mamba_d_state=8)

register(
    Adapter(
        name="Zamba",
        masks="by_layer_type",
        windows=in_hybrid_layers,
        unmasked=(MAMBA,),
        unshared={"ZambaMambaMixer": no_mask},
        restarts=False,
        since="5.16",
        tiny={"zamba": [dict(SHARED, mamba_dt_rank=8, attention_head_dim=32)]},
    )
)

register(
    Adapter(
        name="Zamba 2",
        masks="by_layer_type",
        windows=in_hybrid_layers,
        unmasked=(MAMBA,),
        unshared={"Zamba2MambaMixer": no_mask},
        branched={"Zamba2MambaMixer": MAMBA_2},
        restarts=False,
        since="5.16",
        tiny={
            "zamba2": [
                dict(SHARED, n_mamba_heads=8, chunk_size=16, adapter_rank=8, use_mem_rope=True),
                dict(
                    SHARED,
                    n_mamba_heads=8,
                    chunk_size=16,
                    adapter_rank=8,
                    head_dim=32,
                    use_shared_attention_adapter=True,
                ),
            ],
        },
    )
)

register(
    Adapter(
        name="Falcon-H1",
        masks="by_layer_type",
        windows=in_hybrid_layers,
        unmasked=(MAMBA,),
        unshared={"FalconH1Mixer": no_mask},
        branched={"FalconH1Mixer": MAMBA_2},
        restarts=False,
        logit_transform=lambda config: LogitTransform(scale=config.lm_head_multiplier),
        since="5.24",
        tiny={
            "falcon_h1": [
                dict(
                    STATE,
                    mamba_d_ssm=128,
                    lm_head_multiplier=0.5,
                    ssm_in_multiplier=2.0,  # scans that outweigh the attention beside them: their states show
                    ssm_out_multiplier=3.0,
                    embedding_multiplier=2.0,
                    key_multiplier=0.7,
                    ssm_multipliers=[0.9, 0.8, 1.1, 0.7, 1.2],
                )
            ]
        },
    )
)

GRANITE = dict(attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=4.0)
GRANITE |= dict(shared_intermediate_size=32, num_experts_per_tok=2)

register(
    Adapter(
        name="Granite 4",
        masks="by_layer_type",
        unmasked=(MAMBA,),
        unshared={"GraniteMoeHybridMambaLayer": no_mask},
        branched={"GraniteMoeHybridMambaLayer": MAMBA_2},
        restarts=False,
        logit_transform=lambda config: LogitTransform(scale=1 / config.logits_scaling),
        since="5.16",
        tiny={
            "granitemoehybrid": [
                dict(GRANITE, **STATE, layer_types=[MAMBA, MAMBA, FULL, MAMBA], num_local_experts=4),
                # Without experts, and without mixers that carry a state: the smallest ones are such.
                dict(GRANITE, **STATE, layer_types=[FULL] * 4, num_local_experts=0, position_embedding_type="rope"),
            ]
        },
    )
)
