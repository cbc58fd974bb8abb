"""DiffLlama: the difference of two attention maps."""

from flexpatch.registry import Adapter, register

register(Adapter(name="DiffLlama", masks="single", since="5.13", tiny={"diffllama": [{}]}))
