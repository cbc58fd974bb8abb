"""Nemotron 3 and 4 (Minitron), dense. (Nemotron-H: adapters/hybrid_mamba.py.)"""

from flexpatch.registry import Adapter, register

register(
    Adapter(name="Nemotron", masks="single", since="5.2", marks=False, tiny={"nemotron": [{}]}, limits="compile=False")
)
