"""StableLM 2: rope on a quarter of each head; some sizes norm queries and keys or have parallel residuals."""

from flexpatch.registry import Adapter, register

register(
    Adapter(
        name="StableLM",
        masks="single",
        tiny={"stablelm": [dict(use_qkv_bias=True), dict(qk_layernorm=True, use_parallel_residual=True)]},
    )
)
