"""Ranks that hold parts of sequences are refused however that was switched on, and a row whose mask does not arrive."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from accelerate import big_modeling
from accelerate.state import AcceleratorState
from helpers.needs import needs
from helpers.oracle import random_ids
from helpers.processes import PROGRAMS, start_python, torchrun
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flexpatch
from flexpatch import arrival, parallelism
from flexpatch.arrival import Row
from flexpatch.masks import block_mask
from flexpatch.models import tiny_model
from flexpatch.parallelism import GROUP, MESH

PROMPT, *ANSWERS = random_ids(24, 4, 4, 4)
IDS = torch.tensor([PROMPT + answer for answer in ANSWERS])
# On several ranks. Those of CI, and the others.
FAST = ["torch_context_manager", "a_trainers_attention"]
FAST_OF_ACCELERATE = ["accelerate_configuration", "meshes_without_parts"]
SLOW = [
    "torch_dispatcher", "torch_module_hooks", "a_trainers_group", "a_trainers_mesh",
    "a_patched_sdpa", "ddp", "fsdp2", "megatron_norms",
]  # fmt: skip
needs_hooks = needs("accelerate", "1.10", "hooks of context parallelism")
needs_sizes = needs("accelerate", "1.12", "a ParallelismConfig with cp_size and sp_size")
ALLOWED = {"ddp", "fsdp2", "meshes_without_parts", "megatron_norms"}


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have compiled layers."""
    monkeypatch.setattr(arrival, "_graphs", [])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS, use_cache=False).logits
    return output


def row_logits(model: nn.Module) -> Tensor:
    rows = flexpatch.build_rows([[flexpatch.Tree.of(PROMPT, *ANSWERS)]])
    with torch.no_grad():
        output: Tensor = model(**flexpatch.model_inputs(model, rows)).logits
    return output


def drop_masks(model: PreTrainedModel) -> None:
    """A trainer's own scheme, under no name that tells."""

    def prepare(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": None}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(prepare, with_kwargs=True)


def causal_masks(model: PreTrainedModel) -> None:
    def prepare(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["position_embeddings"][0].shape[1]
        causal: Any = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        if isinstance(kwargs["attention_mask"], BlockMask):
            causal = block_mask(torch.full((1, length), length), torch.arange(length)[None], None)
        return args, kwargs | {"attention_mask": causal}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(prepare, with_kwargs=True)


def half_the_tokens(model: PreTrainedModel) -> None:
    """Each rank takes its half in the first layer, with a mask of that size; nobody gathers it again."""

    def split(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        half = args[0].shape[1] // 2
        cos, sin = kwargs["position_embeddings"]
        return (args[0][:, :half],), kwargs | {"position_embeddings": (cos[:, :half], sin[:, :half])}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(split, with_kwargs=True)


def own_attention(model: PreTrainedModel) -> None:
    """Replaced on the objects, as Unsloth and older trainers do: the registered function is never asked."""
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **others: (hidden_states, None)


GUARDED: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "no mask": (drop_masks, r"got no mask in place of a row's.*test_parallelism.drop_masks.<locals>.prepare"),
    "another mask": (causal_masks, r"got another mask in place of a row's"),
    "half the tokens": (half_the_tokens, r"queries and \d+ keys for a row of 36 tokens"),
    "own attention": (own_attention, "a row's mask was not used"),
}


@needs_hooks
@pytest.mark.parametrize("call", [logits, row_logits])
@pytest.mark.parametrize("first", [True, False], ids=["before apply", "after apply"])
def test_accelerates_hooks(call: Callable[[nn.Module], Tensor], first: bool) -> None:
    model = tiny_model("llama")
    if first:
        big_modeling._attach_context_parallel_hooks(model)
        with pytest.raises(flexpatch.UnsupportedModelError, match=r"_attach_context_parallel_hooks.*flexpatch.remove"):
            flexpatch.apply(model)
        assert not flexpatch.is_applied(model)
        return
    flexpatch.apply(model)
    call(model)
    big_modeling._attach_context_parallel_hooks(model)
    with pytest.raises(flexpatch.UnsupportedModelError, match=r"LlamaAttention has the hook .*context_parallel"):
        call(model)


@pytest.mark.parametrize("call", [logits, row_logits])
@pytest.mark.parametrize(
    ("name", "backend"), [(name, "dense") for name in GUARDED] + [(name, "flex") for name in GUARDED]
)
def test_a_scheme_without_a_name(name: str, backend: str, call: Callable[[nn.Module], Tensor]) -> None:
    """What arrives in attention is compared with what left the hook."""
    switch_on, message = GUARDED[name]
    model = flexpatch.apply(tiny_model("llama"), backend=backend)
    switch_on(model)
    with pytest.raises(flexpatch.FlexpatchError, match=message):
        call(model)


@pytest.mark.parametrize("switch_on", [drop_masks, causal_masks, own_attention])
def test_without_the_check_they_are_numbers(
    switch_on: Callable[[PreTrainedModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: what the checks refuse would be wrong."""
    stock = logits(tiny_model("llama"))
    model = flexpatch.apply(tiny_model("llama"), backend="dense")
    assert (logits(model) - stock).abs().max() < 1e-10
    monkeypatch.setattr(Row, "check_attention", lambda *args: None)
    monkeypatch.setattr(Row, "check_reached", lambda *args: None)
    switch_on(model)
    assert (logits(model) - stock).abs().max() > 0.1


def test_ordinary_calls_are_not_looked_at() -> None:
    """Generation, and batches that run as they are given, go to the model's own attention, with its own masks."""
    model = flexpatch.apply(tiny_model("llama"), backend="dense")
    stock = tiny_model("llama")
    drop_masks(model)
    drop_masks(stock)
    some = dict(input_ids=IDS[:1], use_cache=True)
    assert torch.equal(model(**some).logits, stock(**some).logits)


def test_a_copy_of_a_mask_in_another_dtype_is_the_rows() -> None:
    mask = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e4)
    row, q = Row(8, {"full_attention": mask}, dense="sdpa"), torch.zeros(1, 2, 8, 4)
    row.check_attention(nn.Identity(), q, q, mask.bfloat16())
    with pytest.raises(flexpatch.UnsupportedModelError, match="got another mask"):
        row.check_attention(nn.Identity(), q, q, mask.bfloat16() * 0)
    with pytest.raises(flexpatch.UnsupportedModelError, match="got 8 queries and 16 keys"):
        row.check_attention(nn.Identity(), q, torch.cat([q, q], 2), mask)


@contextmanager
def launcher(**sizes: int) -> Iterator[None]:
    """The variables that accelerate's launcher sets."""
    variables = {f"PARALLELISM_CONFIG_{name.upper()}": str(size) for name, size in sizes.items()}
    with mock.patch.dict(os.environ, ACCELERATE_USE_PARALLELISM_CONFIG="true", **variables):
        yield


@contextmanager
def configuration(**sizes: Any) -> Iterator[None]:
    """What an Accelerator keeps: for all of a process."""
    with mock.patch.dict(AcceleratorState._shared_state, parallelism_config=accelerate.ParallelismConfig(**sizes)):
        yield


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
@pytest.mark.parametrize("given", [launcher, pytest.param(configuration, marks=needs_sizes)])
def test_accelerates_sizes(given: Callable[..., Any], name: str) -> None:
    with given(**{name: 2}), pytest.raises(flexpatch.UnsupportedModelError, match=f"(?i){name}=2"):
        flexpatch.apply(tiny_model("llama"))
    model = flexpatch.apply(tiny_model("llama"))
    with given(**{name: 2}), pytest.raises(flexpatch.UnsupportedModelError, match=f"(?i){name}=2"):
        logits(model)
    with given(**{name: 2}), pytest.raises(flexpatch.UnsupportedModelError, match=f"(?i){name}=2"):
        row_logits(model)
    with given(cp_size=1, sp_size=1, dp_shard_size=2):
        logits(flexpatch.apply(model))


def test_names_of_meshes_and_groups() -> None:
    """What trainers call them, and names of other things that sound alike."""
    meshes = "cp sp context sequence ring ulysses context_parallel sequence_parallel"
    assert all(MESH.fullmatch(name) for name in meshes.split())
    others = "dp tp pp ep data dp_cp dp_shard_cp dp_replicate fsdp dp_sp tensor_and_context_parallel"
    assert not any(MESH.fullmatch(name) for name in others.split())
    groups = (
        "_SEQUENCE_PARALLEL_GROUP _ULYSSES_SEQUENCE_PARALLEL_GROUP RING_ATTN_GROUP _CONTEXT_PARALLEL_GROUP sp_group"
    )
    assert all(GROUP.fullmatch(name) for name in groups.split())
    others = "_SEQUENCE_DATA_PARALLEL_GROUP _TENSOR_AND_CONTEXT_PARALLEL_GROUP _DATA_PARALLEL_GROUP_WITH_CP group GROUP"
    assert not any(GROUP.fullmatch(name) for name in others.split())


def test_alone_nothing_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank may replace functions, and keep groups: the control of the tests with several ranks."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *args, **kwargs: own(*args, **kwargs))
    model = flexpatch.apply(tiny_model("llama"), backend="dense")
    assert (logits(model) - logits(tiny_model("llama"))).abs().max() < 1e-10


def test_meshes_are_looked_for_at_apply_and_at_a_models_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers make theirs after ``apply``, and looking takes too long for every call."""
    looked = []
    monkeypatch.setattr(parallelism, "_meshes", lambda: looked.append(1) or [])
    monkeypatch.setattr(parallelism, "distributed", SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, ProcessGroup=int,
    ))  # fmt: skip
    model = flexpatch.apply(tiny_model("llama"), backend="dense")
    assert len(looked) == 1
    for _ in range(3):
        logits(model)
    assert len(looked) == 2


def on_two_ranks(names: list[str], folder: Path) -> None:
    program = str(PROGRAMS / "parallelism_ranks.py")
    start_python([*torchrun(), program, str(folder), *names], folder, timeout=600)
    for rank in range(2):
        results = json.loads((folder / f"{rank}.json").read_text())
        assert list(results) == names
        for name, calls in results.items():
            for call, answer in calls.items():
                if name in ALLOWED:
                    assert isinstance(answer, float) and answer < 1e-10, (rank, name, call, answer)
                else:
                    assert str(answer).startswith("ranks hold parts of sequences here ("), (rank, name, call, answer)


def test_two_ranks(tmp_path: Path) -> None:
    """In one run: ranks take long to start. An accelerate without the sizes says so below."""
    too_old = needs_sizes.args[0]
    on_two_ranks(FAST if too_old else FAST + FAST_OF_ACCELERATE, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        SLOW,
        pytest.param(["accelerate_mesh"], marks=needs_sizes),
        pytest.param(["deepspeed_ulysses"], marks=pytest.mark.heavy("deepspeed")),
    ],
)
def test_the_other_ways_on_two_ranks(names: list[str], tmp_path: Path) -> None:
    on_two_ranks(names, tmp_path)
