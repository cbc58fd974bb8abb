"""Kimi-K2.5: images and videos in grids of patches before DeepSeek-V3. All frames of a video become one."""

from math import prod
from typing import Any

from flexpatch.layouts import Grid, Media, register_media, videos_like
from flexpatch.pictures import draw_grid

LATENT = dict(
    model_type="deepseek_v3",
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    num_key_value_heads=4,
)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
TOWER |= dict(pos_emb_height=4, pos_emb_width=4)


def patch(config: Any) -> tuple[int, ...]:
    """Return the shape of a patch."""
    return 3, config.vision_config.patch_size, config.vision_config.patch_size


GRID = Grid(merged=lambda config: prod(config.vision_config.merge_kernel_size), pooled=True)

register_media(
    Media(
        name="Kimi-K2.5",
        images=GRID,
        videos=videos_like(GRID),
        draw=draw_grid(patch, lambda config: config.vision_config.merge_kernel_size[0]),
        tiny={
            "kimi_k25": [
                dict(
                    text_config=LATENT,
                    vision_config=TOWER,
                    projection_hidden_size=32,
                    image_token_id=149,
                    video_token_id=146,
                    vision_start_token_id=148,
                    vision_end_token_id=147,
                )
            ]
        },
    )
)
