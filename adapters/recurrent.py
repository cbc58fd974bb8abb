"""Families with layers that carry a state from token to token. All are refused, with the reason."""

from flexpatch.registry import Adapter, register

STATE = "state-space layers, whose state runs through the whole row: an attention mask cannot branch it"
LINEAR = "linear-attention layers, whose recurrent state an attention mask cannot branch"
CONVOLUTION = "convolutions over neighbouring tokens of the row, which an attention mask cannot separate"
RECURRENT = "recurrent layers, whose state runs through the whole row: an attention mask cannot branch it"

LAYERS = {
    STATE: (
        *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2"),
        *("nemotron_h", "granitemoehybrid"),
    ),
    LINEAR: ("kimi_linear", "minimax", "olmo_hybrid", "bailing_hybrid"),
    CONVOLUTION: ("lfm2", "lfm2_moe"),
    RECURRENT: ("recurrent_gemma", "rwkv", "xlstm"),
}

register(
    Adapter(
        name="Recurrent",
        masks="single",
        tiny={},
        refused={
            model_type: f"has {layers}. Train it unpatched" for layers, types in LAYERS.items() for model_type in types
        },
    )
)
