"""Phi 1 to 4: one mask for all layers. Phi-4 has the model type of Phi-3. PhiMoE is refused."""

from flexpatch.registry import FULL, Adapter, register

LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0] * 6,
    long_factor=[3.0] * 6,
    original_max_position_embeddings=256,
    partial_rotary_factor=0.75,
)

register(
    Adapter(
        name="Phi 3, Phi 4",
        masks="single",
        windows=lambda config: {FULL: config.sliding_window},
        tiny={
            "phi3": [
                dict(sliding_window=None),
                dict(sliding_window=8),
                # transformers 5.0 reads this factor, newer ones read it in rope_parameters.
                dict(
                    sliding_window=8,
                    rope_parameters=LONGROPE,
                    partial_rotary_factor=0.75,
                ),
            ],
        },
        refused={
            "phimoe": "its router draws random numbers for every token in training, so answers would share one draw. "
            "Train it unpatched",
        },
        limits="longrope: all sequences of a call on one side of its switching length",
    )
)

VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
AUDIO = dict(hidden_size=32, intermediate_size=32, num_blocks=1, num_attention_heads=2, input_size=8)
AUDIO |= dict(nemo_conv_channels=32, ext_pw_out_channel=32, depthwise_separable_out_channel=32, bias_max_distance=16)
TOWERS = dict(
    vision_config=dict(VISION, patch_size=14, crop_size=28, image_token_id=149),
    audio_config=dict(AUDIO, audio_token_id=148),
)

register(
    Adapter(
        name="Phi 4 multimodal",
        masks="single",
        windows=lambda config: {FULL: config.sliding_window},
        since="5.24",
        tiny={
            "phi4_multimodal": [
                dict(TOWERS, sliding_window=8),
                dict(TOWERS, rope_parameters=LONGROPE),
            ]
        },
        limits="calls with images or sound run as they are given; longrope: as Phi 3",
    )
)

register(Adapter(name="Phi 1.5, Phi 2", masks="single", tiny={"phi": [dict(partial_rotary_factor=0.5)]}))
