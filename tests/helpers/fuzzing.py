"""What the fuzz tests share: how many inputs, what became of them, and values that no one should pass.

Each property says of every input whether it was used, and then held to its definition, or refused by name. The quick
profile tries the same inputs every time; with ``FLEXPATCH_FUZZ=long`` in the environment there are many times as many,
and others every time.
"""

import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexpatch import FlexpatchError

LONG = os.environ.get("FLEXPATCH_FUZZ") == "long"
TIMES = 20  # as many in the long profile
SCREEN = 24 * 80

Tried = Callable[..., bool]  # True: used, False: refused
outcomes: dict[str, Counter[str]] = {}
FOLDER = tempfile.TemporaryDirectory()  # as long as the process: a fixture would be one for all inputs of a test


def fuzz(inputs: int, *, long: int | None = None, both: bool = True, **strategies: Any) -> Callable[[Tried], Any]:
    """A test over many inputs, counted in ``outcomes`` by what became of them.

    Args:
        inputs: How many, in the quick profile.
        long: How many in the long one, if not ``TIMES`` as many.
        both: Whether some inputs must be used and some refused; else all must be used.
        strategies: As for hypothesis's ``given``.
    """

    def decorate(test: Tried) -> Any:
        count = (long or TIMES * inputs) if LONG else inputs
        seen = outcomes.setdefault(test.__name__, Counter())

        def counted(**drawn: Any) -> None:
            seen["used" if test(**drawn) else "refused"] += 1

        chosen = settings(
            max_examples=count, derandomize=not LONG, database=None, deadline=None, print_blob=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run = chosen(given(**strategies)(counted))

        @wraps(test)
        def whole() -> None:
            run()
            assert seen["used"] and (seen["refused"] or not both), f"one-sided inputs prove little: {seen}"

        def holds() -> bool:
            """Of the code as it is now: for tests that break it on purpose. Stops at the first input that fails."""
            once = settings(chosen, derandomize=True, phases=[Phase.generate], print_blob=False)
            try:
                once(given(**strategies)(lambda **drawn: test(**drawn)))()
            except Exception:
                return False
            return True

        del whole.__wrapped__  # type: ignore[attr-defined]  # pytest would ask for its arguments as fixtures
        whole.holds = holds  # type: ignore[attr-defined]
        return whole

    return decorate


def refused(call: Callable[[], Any], *names: str) -> FlexpatchError | None:
    """The FlexpatchError of a call, if it raises one, whose message must fit a screen and hold one of ``names``."""
    try:
        call()
    except FlexpatchError as error:
        message = str(error)
        assert message and len(message) < SCREEN, f"a message of {len(message)} characters"
        assert not names or any(name in message for name in names), message
        return error
    return None


def mostly(good: Any, bad: Any) -> Any:
    """Three quarters of one strategy, a quarter of another, however many alternatives each has."""
    return st.integers(0, 3).flatmap(lambda number: bad if number == 0 else good)


HUGE = [2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**63)]

texts = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["", "\ud800", "\x00", "\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "<|end|>", "é😀\u202e", "a" * 3000]
)
numbers = st.integers(0, 9) | st.sampled_from(HUGE) | st.floats(width=32) | st.booleans()
scalars = st.none() | numbers | texts


def nested(depth: int) -> Any:
    """[[[...]]]"""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
) | st.integers(1, 900).map(nested)

good_ids = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def arrays(dtypes: Any, shapes: Any = None) -> Any:
    """NumPy arrays and torch tensors of odd kinds, of small whole values."""
    shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (1, 0)]) if shapes is None else shapes

    def make(dtype: Any, shape: Any, seed: int) -> Any:
        values = np.random.default_rng(seed).integers(0, 3, shape)
        if isinstance(dtype, torch.dtype):
            return torch.from_numpy(np.asarray(values)).to(dtype)
        return values.astype(dtype)

    return st.builds(make, dtypes, shapes, st.integers(0, 99))


any_dtype = st.sampled_from(
    [
        *(np.dtype(kind) for kind in ("i1", "u1", "i2", "i4", "i8", "u8", "f2", "f4", "f8", "?", "c16", "m8[s]", "U2")),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.complex64),
    ]
)
odd_ids = (
    st.lists(scalars, max_size=4)
    | arrays(any_dtype)
    | st.lists(arrays(any_dtype), max_size=3)
    | st.builds(lambda: torch.ones(2, requires_grad=True))
    | st.builds(lambda: torch.ones(2, dtype=torch.int64, device="meta"))
    | st.builds(lambda: np.array([1, 2**63], np.uint64))
    | json_values
    | st.sampled_from([range(3), {1, 2}, b"ab", object(), 1j, Ellipsis, map(int, [])])
)


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values, for which NaN is NaN and True is not 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def table(reports: list[Any]) -> str:
    """The inputs of all fuzz tests that ran, as Markdown."""
    lines = ["| property | inputs | used, and right | refused |", "|---|---|---|---|"]
    total: Counter[str] = Counter()
    for report in sorted(reports, key=lambda report: report.location[1]):
        counts = Counter(dict(report.user_properties)["inputs"])
        total += counts
        name = report.location[2].removeprefix("test_").replace("_", " ")
        lines.append(_line(name if report.passed else f"{name} **FAILED**", counts))
    lines.append(_line("**all**", total))
    versions = f"hypothesis {hypothesis.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"{'Long' if LONG else 'Quick'} profile; {versions}."])


def _line(name: str, counts: Counter[str]) -> str:
    used, not_used = counts["used"], counts["refused"]
    return f"| {name} | {used + not_used:,} | {used:,} | {not_used:,} |"


def temporary(name: str, content: bytes) -> Path:
    path = Path(FOLDER.name) / name
    path.write_bytes(content)
    return path
