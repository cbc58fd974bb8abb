"""MOSS-Transcribe-Diarize: Qwen3 behind an encoder of sound. The record of its text model is that of Qwen3."""

from flexpatch.registry import Adapter, register, sliding_windows

AUDIO = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
AUDIO |= dict(num_mel_bins=8, max_source_positions=16)

register(
    Adapter(
        name="MOSS-Transcribe-Diarize",
        masks="by_layer_type",
        windows=sliding_windows,
        since="5.24",
        tiny={
            "moss_transcribe_diarize": [
                dict(text_config=dict(model_type="qwen3"), audio_config=AUDIO, audio_token_id=149)
            ]
        },
        limits="calls with sound run as they are given",
    )
)
