"""Families whose checkpoints run on Llama's code, under types of their own."""

from flexpatch.registry import Adapter, register

register(
    Adapter(
        name="EXAONE 3, InternLM 3, IQuest-Coder",
        masks="single",
        tiny={"exaone": [{}], "internlm3": [{}], "iquestcoder": [{}]},
    )
)
