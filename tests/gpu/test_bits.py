"""What is deterministic on a GPU: everything under ``torch.use_deterministic_algorithms``, and what is without it.

Under that setting the same seed gives the same bits in every run and process (flex backend, packed rows and folded
batches). ``backend="fa4"`` refuses it (test_fa4.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from helpers.processes import PATH, PROGRAMS
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexpatch.fold import lookup

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
DEVICE = torch.device("cuda")


def start(hash_seed: int, *arguments: str) -> subprocess.Popen[str]:
    # cuBLAS asks for a fixed workspace before its first call.
    env = os.environ | dict(PYTHONHASHSEED=str(hash_seed), PYTHONPATH=PATH, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    command = [sys.executable, str(PROGRAMS / "determinism_runs.py"), "cuda", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(process: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out[-2000:] + err[-8000:]
    return {record["case"]: record for record in map(json.loads, filter(lambda x: x.startswith("{"), out.splitlines()))}


@cache
def processes() -> tuple[dict[str, dict[str, Any]], ...]:
    """Two processes under deterministic algorithms and one without, at once: they mostly compile."""
    started = [start(0), start(1), start(0, "--undetermined")]
    return tuple(records(process) for process in started)


def test_the_same_bits_under_deterministic_algorithms() -> None:
    """Losses and all weights after three steps, token embeddings too: twice in one process, and in another."""
    one, other, _ = processes()
    assert len(one) == 1 + 4 * 2 * 2 + 4 + 2
    for case, record in one.items():
        first, second, another_seed = record["hashes"]
        assert first == second, (case, record["differ"])
        assert another_seed != first, f"{case}: the hash says nothing"
        assert other[case]["hashes"] == record["hashes"], f"{case}: another process, other bits"
    assert one.keys() == other.keys()


def test_the_same_bits_without_them() -> None:
    """Nothing in a step adds with atomics; only that torch would say so if it did is missing."""
    _, _, plain = processes()
    assert len(plain) == 3
    for case, record in plain.items():
        print(case, record)
        first, second, another_seed = record["hashes"]
        assert first == second, (case, record["differ"])
        assert another_seed != first


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_torch_refuses_what_is_not_deterministic() -> None:
    """So the setting is in force: a run without this error used nothing that torch knows to be without order."""
    index, weights = torch.randint(10, (1000,), device=DEVICE), torch.rand(1000, device=DEVICE)
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.bincount(index, weights)


def table(dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, an index into them with many repetitions, and gradients of what is looked up."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 256, generator=generator)
    index = torch.randint(400, (count,), generator=generator)
    gradient = torch.randn(count, 256, generator=generator)
    return hidden.to(DEVICE, dtype).requires_grad_(), index.to(DEVICE), gradient.to(DEVICE, dtype)


def distinct(gradients: list[Tensor]) -> int:
    return len({g.view(torch.uint8).cpu().numpy().tobytes() for g in gradients})


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [100, 1024, 1025, 2048, 3072, 3073, 20_000])
def test_sums_of_a_shared_token(dtype: torch.dtype, count: int, ordered: bool, request: pytest.FixtureRequest) -> None:
    """The gradient of hidden states that are looked up many times: right to a rounding of the sum, and the same bits
    under deterministic algorithms. Without them torch may add with atomics where few tokens stand for many positions
    (from 2.11 on; here 400 for 20,000, in float32).

    Printed: how many different results and how large an error torch's own embedding gives, whose kernel for 1,025 to
    3,072 indices has a race, and the same of an index_add, which uses atomics.
    """
    if ordered:
        request.getfixturevalue("_deterministic")
    hidden, index, gradient = table(dtype, count)
    truth = torch.zeros(400, 256, dtype=torch.float64, device=DEVICE).index_add(0, index, gradient.double())

    def backward(function: Any) -> Tensor:
        return torch.autograd.grad(function(), hidden, gradient)[0]

    def error(gradients: list[Tensor]) -> float:
        return max(float((g.double() - truth).norm() / truth.norm()) for g in gradients)

    ours = [backward(lambda: lookup(hidden, index)) for _ in range(50)]
    stock = [backward(lambda: F.embedding(index, hidden)) for _ in range(200)]
    atomics = [torch.zeros_like(hidden).detach().index_add(0, index, gradient) for _ in range(20)]
    told = [f"{name} {distinct(g)} of {len(g)}, error {error(g):.1e}" for name, g in
            (("lookup", ours), ("embedding", stock), ("index_add", atomics))]  # fmt: skip
    print(f"{dtype}, {count} indices, deterministic {ordered}: {'; '.join(told)}")
    assert error(ours) < {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}[dtype]
    if ordered:
        assert distinct(ours) == 1
    elif count == 20_000:
        assert distinct(atomics) > 1, "the control: sums in any order would have been seen"


@pytest.mark.parametrize("ordered", [True, False])
def test_flash_attention_of_stock_models(ordered: bool, request: pytest.FixtureRequest) -> None:
    """Torch's own flash kernel, which sdpa runs, adds up gradients of queries in any order too, unless asked not to."""
    if ordered:
        request.getfixturevalue("_deterministic")
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = dict(device=DEVICE, dtype=torch.bfloat16, generator=generator)
    q, k, v, gradient = (torch.randn(1, 32, 8192, 128, **shape) for _ in range(4))  # type: ignore[arg-type]
    found = []
    for _ in range(20):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        found.append(torch.autograd.grad(out, leaves, gradient))
    counts = [distinct(list(gradients)) for gradients in zip(*found, strict=True)]
    print(f"deterministic {ordered}: gradients of q, k, v had {counts} different results of {len(found)}")
    assert max(counts) == 1 if ordered else counts[0] > 1
