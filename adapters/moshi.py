"""Moshi (text decoder)."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Moshi (text)", masks="single", since="5.2", tiny={"moshi": [dict(ffn_dim=96)]}))
