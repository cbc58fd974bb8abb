"""GPT-NeoX, which Pythia is: rope on a quarter of each head, attention and MLP in parallel or in turn."""

from flexpatch.registry import Adapter, register

# Each head has keys of its own.
HEADS = dict(num_key_value_heads=4)

register(
    Adapter(
        name="GPT-NeoX (Pythia)",
        masks="single",
        tiny={"gpt_neox": [HEADS, dict(HEADS, use_parallel_residual=False)]},
    )
)
