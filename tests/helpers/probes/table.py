"""The form of a probe, and the list that all probes are added to."""

from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import pytest
from packaging.version import Version

from flexpatch.models import tiny_types, variants
from flexpatch.registry import adapters

# Types whose modeling files have another layout, or few of these facts. Parity tests alone hold what they compute, and
# what types with mixers on separate sequences do.
OTHERWISE = {
    *("biogpt", "codegen", "ctrl", "dbrx", "diffllama", "dory", "flint", "gpt2", "gpt_bigcode", "gptj", "hrm_text"),
    *("jetmoe", "kolibri1", "longcat_flash", "mimo_v2_flash"),
    *("modernbert-decoder", "nemotron", "opt", "persimmon", "stablelm"),
}


class Probe(NamedTuple):
    """One fact.

    Attributes:
        package: Whose fact it is.
        name: The thing that is relied on, in that package's own words.
        user: The function of flexpatch that relies on it, as ``"module.function"``.
        why: What that function needs it for, as the end of a sentence: "to ...", "so that ...".
        holds: Returns whether the fact holds, or raises. With ``of``, it is given one of these model types.
        gone: A dotted path without which the fact cannot hold; empty if there is none.
        since: The release from which on it is found under this name.
        of: Model types; empty for a fact that is not about architectures.
    """

    package: str
    name: str
    user: str
    why: str
    holds: Callable[..., bool | None]
    gone: str = ""
    since: str = "0"
    of: tuple[str, ...] = ()

    def skip_old(self) -> None:
        if Version(metadata.version(self.package)) < Version(self.since):
            pytest.skip(f"{self.package} before {self.since} has it under another name")

    def check(self, *model_type: str) -> None:
        """Fail with a sentence that a maintainer understands, unless ``holds`` returns true, or nothing."""
        self.skip_old()
        try:
            held, how = self.holds(*model_type) is not False, ""
        except (Exception, pytest.fail.Exception) as error:
            held, how = False, f" ({type(error).__name__}: {error})"
        if not held:
            where = "".join(f" in {name}" for name in model_type)
            pytest.fail(
                f"{self.package} {metadata.version(self.package)}: {self.name} is gone or changed{where}{how}. "
                f"flexpatch.{self.user} relies on it {self.why}",
                pytrace=False,
            )


PROBES: list[Probe] = []


def probe(package: str, name: str, user: str, why: str, gone: str = "", since: str = "0") -> Callable[..., Any]:
    """Add a fact to the table; the decorated function checks it."""

    def add(holds: Callable[..., bool | None]) -> Callable[..., bool | None]:
        PROBES.append(Probe(package, name, user, why, holds, gone, since))
        return holds

    return add


def plain(model_type: str) -> bool:
    """Tell whether it is a text model of the layout that most modeling files have."""
    known = adapters().get(model_type)
    return not (known is None or known.unshared or model_type in OTHERWISE or "text_config" in variants(model_type)[0])


def each(name: str, user: str, why: str, of: list[str] | None = None, gone: str = "") -> Callable[..., Any]:
    """Add a fact about every architecture, or about some, to the table."""

    def add(holds: Callable[..., bool | None]) -> Callable[..., bool | None]:
        types = tuple(t for t in tiny_types() if plain(t)) if of is None else tuple(of)
        PROBES.append(Probe("transformers", name, user, why, holds, gone, of=types))
        return holds

    return add
