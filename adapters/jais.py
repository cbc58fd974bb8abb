"""Jais 2."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Jais 2", masks="single", tiny={"jais2": [{}]}))
