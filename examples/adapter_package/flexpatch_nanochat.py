"""NanoChat (github.com/karpathy/nanochat): one mask for all layers, and capped logits."""

from flexpatch.registry import Adapter, Head, register

register(
    Adapter(
        name="NanoChat",
        masks="single",
        head=lambda config: Head(softcap=config.final_logit_softcapping),
        tiny={"nanochat": [{}]},
    )
)
