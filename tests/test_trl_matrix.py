"""Each trainer of TRL 1.16 that sees several completions of a prompt: stock against ``flexpatch.apply(trainer)``."""

from pathlib import Path

import pytest
import trl
from helpers.trl_matrix import BOUND, CASES, CONTROL, KINDS, Row, compare, faults
from packaging.version import Version

from benchmarks.pages import table

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "trl.md"
# One offline and one online trainer, of each kind of model.
FAST = ("DPO", "GRPO, dapo")

pytestmark = [
    pytest.mark.filterwarnings("error::flexpatch.FlexpatchWarning"),
    pytest.mark.usefixtures("nothing_cached"),
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older releases lack some of them"),
]


def marked(cases: tuple[str, ...] | list[str], fast: tuple[str, ...]) -> list:
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", marked(list(CASES), FAST))
@pytest.mark.parametrize("kind", list(KINDS))
def test_agrees(case: str, kind: str) -> None:
    row = compare(case, kind)
    print(row)
    assert faults(row) == []


@pytest.mark.parametrize("case", marked(list(CASES), ()))
@pytest.mark.parametrize("kind", list(KINDS))
def test_siblings_that_are_seen_are_noticed(case: str, kind: str) -> None:
    row = compare(case, kind, broken=True)
    print(row)
    assert {"losses differ", "weights differ"} & set(faults(row))
    assert max(row.loss, row.weight) > CONTROL * BOUND


def test_faults_are_found() -> None:
    right = dict(case="DPO", kind="Llama", folded=3, batches=3, factor=2.0, loss=1e-7, weight=1e-7, moved=0.1)
    wrong = [dict(folded=2), dict(folded=0, batches=0), dict(loss=float("nan")), dict(loss=2e-5), dict(weight=2e-5)]
    assert faults(Row(**right)) == []
    assert all(faults(Row(**right | other)) for other in [*wrong, dict(moved=1e-4)])


def test_the_table_holds_each_case() -> None:
    """And no line of it is out of bounds: ``python tests/programs/trl_table.py benchmarks/results/trl.md``."""
    rows = table(RESULT.read_text(encoding="utf-8"))
    assert [(row["TRL's trainer"], row["model"]) for row in rows] == [(case, kind) for case in CASES for kind in KINDS]
    for row in rows:
        folded, batches = map(int, row["batches folded"].split(" of "))
        assert folded == batches > 0, row
        assert float(row["fewer tokens"].rstrip("×")) > 1.2, row
        assert max(float(row[f"{what} differ by"]) for what in ("losses", "weights")) <= BOUND, row
