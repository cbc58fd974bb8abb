"""Llama 1 to 3: one mask for all layers, without windows. (Llama 4: adapters/llama4.py.)"""

from flexpatch.registry import Adapter, register

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

register(
    Adapter(
        name="Llama",
        masks="single",
        tiny={"llama": [{}, dict(rope_parameters=LLAMA3), dict(rope_parameters=YARN, tie_word_embeddings=True)]},
    )
)
