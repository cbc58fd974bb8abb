"""Persimmon: rope on half of each head. (Fuyu is its multimodal class.)"""

from flexpatch.registry import Adapter, register

register(Adapter(name="Persimmon", masks="single", tiny={"persimmon": [{}]}))
