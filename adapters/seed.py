"""Seed-OSS. Its configuration asks for dropout, which is refused: load the model with both rates set to 0.0."""

from flexpatch.registry import Adapter, register

register(
    Adapter(
        name="Seed-OSS",
        masks="single",
        tiny={"seed_oss": [dict(attention_dropout=0.0, residual_dropout=0.0)]},
        limits="load it with attention_dropout=0.0, residual_dropout=0.0",
    )
)
