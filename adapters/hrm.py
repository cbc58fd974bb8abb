"""HRM-Text: layers that run in loops."""

from flexpatch.registry import Adapter, register

register(Adapter(name="HRM-Text", masks="single", tiny={"hrm_text": [{}]}))
