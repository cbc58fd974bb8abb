"""ModernBERT's decoder: windows in two layers of three, and a layer between hidden states and the head."""

from flexpatch.registry import Adapter, register, sliding_windows

register(
    Adapter(
        name="ModernBERT (decoder)",
        masks="by_layer_type",
        windows=sliding_windows,
        before_head=("lm_head",),
        since="5.24",
        # A window is half of this number.
        tiny={"modernbert-decoder": [dict(local_attention=16)]},
    )
)
