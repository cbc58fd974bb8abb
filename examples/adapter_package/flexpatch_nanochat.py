"""NanoChat (github.com/karpathy/nanochat): one mask for all layers, and capped logits."""

from flexpatch.registry import Adapter, LogitTransform, register

register(
    Adapter(
        name="NanoChat",
        masks="single",
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping),
        tiny={"nanochat": [{}]},
    )
)
