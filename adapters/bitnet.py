"""BitNet: norms between a layer's projections."""

from flexpatch.registry import Adapter, register

register(Adapter(name="BitNet", masks="single", tiny={"bitnet": [{}]}))
