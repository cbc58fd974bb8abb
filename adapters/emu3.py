"""Emu3: text and the codes of images in one vocabulary."""

from flexpatch.registry import Adapter, register

CODES = dict(
    codebook_size=16, base_channels=32, channel_multiplier=[1], num_res_blocks=1, attn_resolutions=[], hidden_size=32
)
TINY = dict(text_config=dict(attention_dropout=0.0), vq_config=CODES, vocabulary_map={"<image>": 149})

register(
    Adapter(
        name="Emu3",
        masks="single",
        since="5.24",
        tiny={"emu3": [TINY], "emu3_text_model": [dict(TINY, model_type="emu3")]},
        limits="load it with attention_dropout=0.0 in its text_config; calls with images run as they are given",
    )
)
