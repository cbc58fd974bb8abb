"""NanoChat: logits are capped."""

from flexpatch.registry import Adapter, LogitTransform, register

register(
    Adapter(
        name="NanoChat",
        masks="single",
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping),
        tiny={"nanochat": [{}]},
    )
)
