"""Mllama (Llama 3.2 Vision): layers that attend to an image, which calls without one skip."""

from typing import Any

from flexpatch.registry import Adapter, LogitTransform, register

VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=2
)
VISION |= dict(image_size=28, patch_size=14, vision_output_dim=64, intermediate_layers_indices=[0])
VISION |= dict(max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
TINY = dict(
    text_config=dict(cross_attention_layers=[1], rope_parameters=ROPE), vision_config=VISION, image_token_index=149
)

register(
    Adapter(
        name="Mllama",
        masks="single",
        logit_transform=lambda config: LogitTransform(wide=True),
        since="5.24",
        tiny={"mllama": [TINY], "mllama_text_model": [dict(TINY, model_type="mllama")]},
        limits="calls with images run as they are given",
    )
)
