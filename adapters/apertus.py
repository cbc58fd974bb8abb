"""Apertus (Swiss AI): one mask for all layers, normalised queries and keys."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Apertus", masks="single", tiny={"apertus": [{}], "apertus1p5_text": [{}]}))
