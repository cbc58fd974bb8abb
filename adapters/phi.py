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

register(Adapter(name="Phi 1.5, Phi 2", masks="single", tiny={"phi": [dict(partial_rotary_factor=0.5)]}))
