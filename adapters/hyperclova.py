"""HyperCLOVA X: logits are multiplied by a constant."""

from flexpatch.registry import Adapter, LogitTransform, register

SCALES = dict(attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=3.0)

register(
    Adapter(
        name="HyperCLOVA X",
        masks="single",
        logit_transform=lambda config: LogitTransform(scale=config.logits_scaling),
        tiny={"hyperclovax": [SCALES]},
    )
)
