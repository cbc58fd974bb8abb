"""Nemotron 4 and Minitron: rope on half of each head. (Nemotron H has state-space layers: adapters/recurrent.py.)"""

from flexpatch.registry import Adapter, register

register(Adapter(name="Nemotron", masks="single", tiny={"nemotron": [{}]}))
