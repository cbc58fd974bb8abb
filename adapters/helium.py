"""Helium (Kyutai): one mask for all layers."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Helium", masks="single", tiny={"helium": [{}]}))
