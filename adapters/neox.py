"""GPT-NeoX, which Pythia is: rope on a quarter of each head, attention and MLP in parallel or in turn."""

from flexpatch.registry import Adapter, register

register(Adapter(name="GPT-NeoX (Pythia)", masks="single", tiny={"gpt_neox": [{}, dict(use_parallel_residual=False)]}))
