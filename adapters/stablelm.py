"""StableLM: rope on a quarter of each head."""

from flexpatch.registry import Adapter, register

NORMS = dict(qk_layernorm=True, use_parallel_residual=True)

register(
    Adapter(
        name="StableLM",
        masks="single",
        since="5.2",
        marks=False,
        tiny={"stablelm": [{}, NORMS]},
        limits="compile=False",
    )
)
