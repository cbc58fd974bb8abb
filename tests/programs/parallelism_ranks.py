"""What flexpatch says on two ranks under each way of sharing out sequences, and under none.

Run by test_parallelism.py, in tests/programs:

    torchrun --nproc_per_node 2 cpu_ranks.py parallelism_ranks.py FOLDER WAY ...
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import accelerate
import torch
from accelerate.state import AcceleratorState
from helpers.oracle import random_ids
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import _attention as torch_cp
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flexpatch
from flexpatch.models import tiny_model

PROMPT, *ANSWERS = random_ids(24, 4, 4, 4)
IDS = torch.tensor([PROMPT + answer for answer in ANSWERS])
Steps = Iterator[nn.Module | None]


def mesh(*names: str) -> Any:
    """A mesh of two ranks in its last dimension."""
    return init_device_mesh("cpu", (1,) * (len(names) - 1) + (2,), mesh_dim_names=names or None)


@contextmanager
def torch_context_manager(model: PreTrainedModel) -> Steps:
    buffer = IDS.clone()
    with context_parallel(mesh(), buffers=[buffer], buffer_seq_dims=[1]):
        yield model


@contextmanager
def torch_dispatcher(model: PreTrainedModel) -> Steps:
    torch_cp._enable_context_parallel_dispatcher()
    yield model
    torch_cp._disable_context_parallel_dispatcher()


@contextmanager
def torch_module_hooks(model: PreTrainedModel) -> Steps:
    style = torch_cp._ContextParallel(seq_dim=2, attention_type=torch_cp._ContextParallel.AttentionType.SDPA)
    parallelize_module(model.model.layers[0].self_attn, mesh(), style)
    yield model


@contextmanager
def accelerate_mesh(model: PreTrainedModel) -> Steps:
    """accelerate's own mesh, kept by the caller alone."""
    kept = accelerate.ParallelismConfig(cp_size=2).build_device_mesh("cpu")
    yield model
    del kept


@contextmanager
def accelerate_configuration(model: PreTrainedModel) -> Steps:
    AcceleratorState._reset_state()
    with (
        mock.patch.dict("os.environ", ACCELERATE_USE_CPU="true"),
        mock.patch.object(accelerate.ParallelismConfig, "_validate_accelerator"),
    ):
        accelerate.Accelerator(cpu=True, parallelism_config=accelerate.ParallelismConfig(cp_size=2))
        yield model
    AcceleratorState._reset_state()


@contextmanager
def deepspeed_ulysses(model: PreTrainedModel) -> Steps:
    """As accelerate does for sp_backend="deepspeed"."""
    from deepspeed import comm
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    comm.init_distributed("gloo", verbose=False)
    stock = tiny_model("llama")
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping):
        UlyssesSPAttentionHF.register_with_transformers(stock, "sdpa", 2, 1)
        yield model
    parallel_state_sp._release_sequence_parallel_groups()


@contextmanager
def a_trainers_group(model: PreTrainedModel) -> Steps:
    """verl's: one global variable, set for the time of a step."""
    module = ModuleType("verl.utils.ulysses")
    module._ULYSSES_SEQUENCE_PARALLEL_GROUP = None  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"verl.utils.ulysses": module}):
        flexpatch.parallelism._groups.cache_clear()
        module._ULYSSES_SEQUENCE_PARALLEL_GROUP = distributed.group.WORLD  # type: ignore[attr-defined]
        yield model


@contextmanager
def a_trainers_mesh(model: PreTrainedModel) -> Steps:
    """ms-swift's names."""
    kept = mesh("data", "sequence")
    yield model
    del kept


@contextmanager
def a_trainers_attention(model: PreTrainedModel) -> Steps:
    """A function of no telling name in place of sdpa, which sees whole sequences by a collective."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **kwargs: Any) -> Any:
        distributed.all_reduce(torch.zeros(1))
        return own(*args, **kwargs)

    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, sdpa=attend):
        yield model


@contextmanager
def a_patched_sdpa(model: PreTrainedModel) -> Steps:
    own = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", lambda *args, **kwargs: own(*args, **kwargs)):
        yield model


@contextmanager
def ddp(model: PreTrainedModel) -> Steps:
    yield DistributedDataParallel(model)


@contextmanager
def fsdp2(model: PreTrainedModel) -> Steps:
    kept = mesh("dp_replicate", "dp_shard_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=kept["dp_shard_cp"])
    yield fully_shard(model, mesh=kept["dp_shard_cp"])


@contextmanager
def meshes_without_parts(model: PreTrainedModel) -> Steps:
    """Of size 1 where sequences are concerned, such as accelerate's and verl's defaults."""
    kept = [init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp", "cp", "sp")), mesh("dp", "tp")]
    module = ModuleType("verl.utils.ulysses")
    alone = [distributed.new_group([rank]) for rank in range(2)][distributed.get_rank()]
    module._ULYSSES_SEQUENCE_PARALLEL_GROUP = alone  # type: ignore[attr-defined]
    AcceleratorState._reset_state()
    with (
        mock.patch.dict(sys.modules, {"verl.utils.ulysses": module}),
        mock.patch.dict("os.environ", ACCELERATE_USE_CPU="true"),
    ):
        accelerate.Accelerator(cpu=True, parallelism_config=accelerate.ParallelismConfig())
        yield model
    AcceleratorState._reset_state()
    del kept


@contextmanager
def megatron_norms(model: PreTrainedModel) -> Steps:
    """Sequence parallelism as part of tensor parallelism: norms run on parts of a sequence, attention on all of it."""
    norm = model.model.norm
    parallelize_module(norm, mesh(), SequenceParallel(use_local_output=False))
    norm.register_forward_hook(lambda module, args, output: output.full_tensor())
    yield model


def answer(function: Callable[[], Any]) -> str | float:
    """The refusal, or how far logits are from the unpatched model's."""
    try:
        return float((function() - STOCK).abs().max())
    except flexpatch.UnsupportedModelError as error:
        return str(error)


def fold(model: nn.Module) -> Any:
    return model(input_ids=IDS, use_cache=False).logits.detach()


def rows(model: nn.Module) -> Any:
    tree = flexpatch.build_rows([[flexpatch.Tree.of(PROMPT, *ANSWERS)]])
    flexpatch.model_inputs(model, tree)
    return STOCK


def tried(way: Callable[[PreTrainedModel], Any]) -> dict[str, str | float]:
    """At ``apply``; and with the way switched on between ``apply`` and a call, for a batch and for rows."""
    result = {}
    with way(tiny_model("llama")) as model:
        result["apply"] = answer(lambda: fold(flexpatch.apply(model)))
    with way(flexpatch.apply(tiny_model("llama"))) as model:
        result |= {"fold": answer(lambda: fold(model)), "rows": answer(lambda: rows(model))}
    return result


def main(folder: Path, names: list[str]) -> None:
    distributed.init_process_group("gloo")
    results = {name: tried(globals()[name]) for name in names}
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(results))


STOCK = fold(tiny_model("llama"))
if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
