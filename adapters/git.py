"""GIT: attention of its own, and absolute positions. Images come in front of all tokens."""

from flexpatch.registry import Adapter, causal, register

VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

register(
    Adapter(
        name="GIT",
        masks="single",
        unshared={"GitSelfAttention": causal},
        implementations=("eager",),
        begins="position",
        padding="masked",
        since="5.24",
        tiny={"git": [dict(vision_config=VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)]},
        limits="attn_implementation='eager' for ordinary calls; calls with images run as they are given; batches "
        "padded on the left fold if they have position_ids",
    )
)
