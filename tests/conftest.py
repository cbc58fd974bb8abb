"""Fixtures shared by all tests.

Cases: ``@parameterized.expand``, above all other decorators (they would be lost), where a test takes its cases and
nothing else; ``@pytest.mark.parametrize`` where pytest has more to do: fixtures, ids, marks of one case, crossed lists.
"""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flex import let_flex_train_on_cpu
from helpers.quick import QUICK

# Tiny models gain nothing from threads, and those of several workers would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, which accelerate imports, would print that it found no other


@pytest.fixture
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file that a trainer could find, and spare itself the work of an earlier run."""
    import datasets

    monkeypatch.chdir(tmp_path)
    datasets.disable_caching()
    yield
    datasets.enable_caching()


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention that trains on the CPU, exactly and in float64.

    Torch refuses gradients of flex on the CPU because Inductor has no kernel for them. Block masks, score functions,
    autograd and Dynamo's guards are the same code on every device, so with the check off and without Inductor
    (``aot_eager``) all of them are tested here; only the kernels need ``tests/gpu``.

    Graphs are kept from test to test; one that counts them starts with ``torch._dynamo.reset()``.
    """
    let_flex_train_on_cpu(monkeypatch)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def torchao() -> Any:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao import quantization

    return quantization


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark quick tests before pytest chooses by marks."""
    for item in items:
        place = item.nodeid.removeprefix("tests/")
        kinds = {mark.name for mark in item.iter_markers()}
        if place.startswith(tuple(QUICK)) and not kinds & {"gpu", "heavy", "slow"}:
            item.add_marker("quick")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``heavy("deepspeed")`` where that package is not installed."""
    for mark in item.iter_markers("heavy"):
        if find_spec(mark.args[0]) is None:
            pytest.skip(f"needs {mark.args[0]}, which comes with the extra test-all: pip install -e '.[test-all]'")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-table", type=Path, help="write the table of fuzzed inputs to this file too")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What became of a fuzz test's inputs travels with its report, from other processes too."""
    try:
        return (yield)
    finally:
        fuzzing = sys.modules.get("helpers.fuzzing")  # imported by fuzz tests alone: others must run without hypothesis
        if fuzzing is not None and item.name in fuzzing.outcomes:
            item.user_properties.append(("inputs", dict(fuzzing.outcomes[item.name])))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    reports = [report for report in reports if "inputs" in dict(report.user_properties)]
    if not reports:
        return
    from helpers import fuzzing

    table = fuzzing.table(reports)
    terminalreporter.section("fuzzed inputs")
    terminalreporter.write_line(table)
    if path := config.getoption("--fuzz-table"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table + "\n", encoding="utf-8")
