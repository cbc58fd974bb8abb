"""Arcee (AFM): Llama with another activation."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Arcee", masks="single", tiny={"arcee": [{}]}))
