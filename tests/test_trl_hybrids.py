"""Trainers of TRL on tiny hybrids, in float32: stock against ``flexpatch.apply(trainer)``, and against packed batches.

Unpatched Qwen3.5 in float32 is almost 1e-5 from itself in float64. Its bound is a multiple of that, which is measured.
"""

from pathlib import Path

import pytest
import trl
from helpers.trl_hybrids import HYBRIDS, ONE_LINE, PACKED, ROUNDED, Line, cases, line, packed
from helpers.trl_matrix import BOUND, CONTROL, Row
from packaging.version import Version
from parameterized import parameterized

import flexpatch
from benchmarks.pages import table
from flexpatch.forward import hook_of
from flexpatch.models import tiny_model
from flexpatch.registry import CONVOLUTION, DELTA_RULE, STATE_SPACE
from flexpatch.verification import WORST_FACTOR

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "trl_hybrids.md"
FAST = [("PackedDPO", "Qwen3.5"), ("PackedKTO", "DeepSeek V3.2"), ("PackedGRPO", "Nemotron-H")]

pytestmark = [
    pytest.mark.filterwarnings("error::flexpatch.FlexpatchWarning"),
    pytest.mark.usefixtures("nothing_cached"),
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older releases lack some trainers"),
]


def marked(pairs: list[tuple[str, str]]) -> list:
    return [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("case", "kind"), marked(cases(*ONE_LINE, *PACKED)), ids=str)
def test_agrees(case: str, kind: str) -> None:
    found = line(case, kind)
    print(found)
    assert found.faults() == []


@parameterized.expand(cases("PackedDPO"))
@pytest.mark.slow
def test_siblings_that_are_seen_in_packed_batches_are_noticed(case: str, kind: str) -> None:
    found = packed(case, kind, broken=True)
    assert {"losses differ", "weights differ"} <= set(found.faults())
    assert min(found.row.loss, found.row.weight) > CONTROL * BOUND


def test_kinds_of_mixers() -> None:
    """Two that branch and two that run on separate sequences."""
    found = {}
    for kind, model_type in HYBRIDS.items():
        hook = hook_of(flexpatch.apply(tiny_model(model_type)))
        assert hook is not None
        found[kind] = (set(hook.branches.kinds) if hook.branches is not None else set(), hook.mixers)
    assert found["Qwen3.5"] == ({CONVOLUTION, DELTA_RULE}, 0) and found["Nemotron-H"] == ({CONVOLUTION, STATE_SPACE}, 0)
    assert found["Jamba"] == (set(), 3) and found["DeepSeek V3.2"] == (set(), 4)


def test_faults_are_found() -> None:
    right = dict(case="DPO", kind="Qwen3.5", folded=3, batches=3, factor=2.0, loss=2e-5, weight=2e-5, moved=0.1)
    assert Line(Row(**right), (1e-5, 1e-5)).faults() == []
    assert Line(Row(**right), None).faults() == ["losses differ", "weights differ"]
    assert Line(Row(**right), (1e-6, 1e-6)).faults() == ["losses differ", "weights differ"]
    assert Line(Row(**right | dict(kind="Jamba")), (1e-5, 1e-5)).faults() == ["losses differ", "weights differ"]
    assert Line(Row(**right | dict(loss=5e-5)), (1e-5, 1e-5)).faults() == ["losses differ"]


def test_the_table_holds_each_case() -> None:
    """And no line of it is out of bounds: ``python tests/programs/trl_table.py benchmarks/results/trl_hybrids.md``."""
    rows = table(RESULT.read_text(encoding="utf-8"))
    assert [(row["TRL's trainer"], row["model"]) for row in rows] == cases(*ONE_LINE, *PACKED)
    for row in rows:
        folded, batches = map(int, row["batches folded"].split(" of "))
        assert folded == batches > 0, row
        assert float(row["fewer tokens"].rstrip("×")) > 1.2, row
        for what in ("losses", "weights"):
            own = float(row[f"stock's own {what}"].replace("–", "0")) if row["model"] in ROUNDED else 0.0
            assert float(row[f"{what} differ by"]) <= max(BOUND, WORST_FACTOR * own), row
