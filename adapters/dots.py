"""dots.llm1: experts, and windows from ``max_window_layers`` on. dots3.note: an indexer chooses keys besides."""

from typing import Any

from flexpatch.registry import FULL, SLIDING, Adapter, Visible, register, sliding_windows

MOE = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1
)

register(
    Adapter(
        name="dots.llm1",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={"dots1": [MOE, dict(MOE, sliding_window=8, max_window_layers=2)]},
    )
)

INDEXED = "indexed_attention"
NOTE = dict(
    num_key_value_heads=4,
    head_dim=24,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    swa_num_attention_heads=2,
    swa_num_key_value_heads=2,
    swa_q_lora_rank=16,
    swa_kv_lora_rank=16,
    swa_head_dim=24,
    swa_qk_nope_head_dim=16,
    swa_v_head_dim=16,
    sliding_window=8,
    layer_types=[INDEXED, SLIDING] * 2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_experts_intermediate_size=32,
    # Few keys are chosen, so that the choice shows. With few heads their scores often tie.
    index_topk=6,
    index_n_heads=16,
    index_head_dim=16,
)
VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(mlp_layer_types=["dense"], adapter_in_dim=32, adapter_out_dim=64)
AUDIO: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, feature_size=8
)
AUDIO |= dict(downsample_hidden_size=16, adapter_input_size=32, adapter_out_dim=64)
MEDIA = dict(vision_config=VISION, audio_config=AUDIO, image_token_id=149, video_token_id=148, audio_token_id=147)


def visible(module: Any) -> Visible:
    """Layers of one type have a window."""
    return Visible(window=module.sliding_window)


register(
    Adapter(
        name="dots3.note",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(INDEXED, SLIDING, FULL),
        unshared={"Dots3NoteTextAttention": visible},
        padding="masked",
        since="5.24",
        tiny={"dots3_note_text": [NOTE], "dots3_note": [dict(text_config=NOTE, **MEDIA)]},
        limits="multimodal class: calls with images, video or sound run as they are given",
    )
)
