"""Persimmon: rope on half of each head. (Fuyu is its multimodal class.)"""

from flexpatch.registry import Adapter, register

register(Adapter(name="Persimmon", masks="single", since="5.2", tiny={"persimmon": [{}]}))
