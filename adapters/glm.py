"""GLM-4 and GLM-4.5: one mask for all layers, rope on half of each head.

GLM-4.7-Flash has latent attention, so it is in adapters/deepseek.py. GLM-5, whose layers choose keys:
adapters/indexed.py.
"""

from flexpatch.registry import Adapter, register

EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1)
MOE = dict(EXPERTS, moe_intermediate_size=32, first_k_dense_replace=1)

register(
    Adapter(
        name="GLM-4, GLM-4.5, Sarvam",
        masks="single",
        tiny={"glm": [{}], "glm4": [{}], "glm4_moe": [MOE, dict(MOE, use_qk_norm=True)], "sarvam_moe": [MOE]},
    )
)
