"""Qwen2 and Qwen3, dense, mixture of experts, and behind an encoder. With linear attention: adapters/hybrid_qwen.py.

Windows are off unless ``use_sliding_window`` is set. A window that is off is 0 in Qwen2-MoE and None in the others.
"""

from flexpatch.registry import FULL, SLIDING, Adapter, register

WINDOW = dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
AUDIO = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
AUDIO |= dict(num_mel_bins=8, max_source_positions=16)
SHARED_EXPERT = dict(MOE, shared_expert_intermediate_size=32)

register(
    Adapter(
        name="Qwen2, Qwen3, MOSS-Transcribe-Diarize",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window or None},
        tiny={
            "qwen2": [{}, WINDOW, dict(num_attention_heads=14, num_key_value_heads=2, hidden_size=112)],
            "qwen2_moe": [SHARED_EXPERT, dict(SHARED_EXPERT, **WINDOW)],
            "qwen3": [{}, WINDOW],
            # Qwen3 behind an encoder of sound.
            "moss_transcribe_diarize": [
                dict(text_config=dict(WINDOW, model_type="qwen3"), audio_config=AUDIO, audio_token_id=149)
            ],
        },
        limits="MOSS-Transcribe-Diarize: calls with sound run as they are given",
    )
)

register(
    Adapter(
        name="Qwen3-MoE",
        masks="single",
        windows=lambda config: {FULL: config.sliding_window or None},
        tiny={"qwen3_moe": [MOE, dict(MOE, **WINDOW)]},
    )
)
