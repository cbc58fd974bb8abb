"""GPT-NeoX (Pythia): rope on a quarter of each head, attention and MLP in parallel or in turn."""

from flexpatch.registry import Adapter, register

# Keys are not shared by heads.
HEADS = dict(num_key_value_heads=4)

register(
    Adapter(
        name="GPT-NeoX (Pythia)",
        masks="single",
        tiny={"gpt_neox": [HEADS, dict(HEADS, use_parallel_residual=False)]},
    )
)
