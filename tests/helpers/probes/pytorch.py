"""Facts about torch."""

import inspect

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

from helpers.probes.architectures import row_mask
from helpers.probes.table import probe

HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


@probe("torch", ", ".join(HOOKS), "forward.remove_hooks", "to find its hooks in copied models, and take them off")
def _modules_keep_hooks_in_tables() -> bool:
    module = nn.Linear(1, 1)
    before = module.register_forward_pre_hook(print, with_kwargs=True)
    after = module.register_forward_hook(print, with_kwargs=True, prepend=True, always_call=True)
    return [list(getattr(module, name)) for name in HOOKS] == [[before.id]] * 2 + [[after.id]] * 3


@probe(
    "torch", "_modules, of a module's own attributes", "refusals.check_mode", "to walk a model fast before every call"
)
@probe("torch", "_modules, of a module's own attributes", "mixers.look_over", "to walk a model fast before every row")
def _modules_keep_their_children() -> bool:
    child = nn.Linear(1, 1)
    return list(vars(nn.Sequential(child))["_modules"].values()) == [child]


@probe(
    "torch", "_modules, _forward_pre_hooks, _forward_hooks, of a module's own attributes", "parallelism._hooks",
    "to find hooks that drop masks",
)  # fmt: skip
@probe(
    "torch", "_modules, _forward_pre_hooks, _forward_hooks, in a module's own attributes", "refusals.check_mode",
    "to walk all modules before a call",
)  # fmt: skip
@probe(
    "torch", "_modules, _parameters, in a module's own attributes; _local_tensor of a DTensor",
    "quantized_layers.layer_fault", "to look at a layer's weights before a call",
)  # fmt: skip
@probe(
    "torch", "_forward_pre_hooks, _forward_hooks, in a module's own attributes", "tuners.as_given",
    "to find what peft does for one call",
)  # fmt: skip
def _modules_keep_children_and_hooks() -> bool:
    module = nn.Sequential(nn.Linear(1, 1))
    module.register_forward_pre_hook(print)
    module.register_forward_hook(repr)
    has = vars(module)
    hooks = [list(has[name].values()) for name in ("_forward_pre_hooks", "_forward_hooks")]
    weights = list(vars(module[0])["_parameters"]) == ["weight", "bias"]
    return list(has["_modules"].values()) == [module[0]] and hooks == [[print], [repr]] and weights


@probe(
    "torch",
    "DTensor._op_dispatcher._custom_op_handlers",
    "parallelism._signs",
    "to see that context parallelism is enabled",
)
def _dispatcher_has_handlers() -> bool:
    import torch.distributed.tensor.experimental._attention as cp

    def attends() -> bool:
        handlers = DTensor._op_dispatcher._custom_op_handlers
        return any("scaled_dot_product" in str(operation) for operation in handlers)

    before = attends()
    cp._enable_context_parallel_dispatcher()
    enabled = attends()
    cp._disable_context_parallel_dispatcher()
    return enabled and not before and not attends()


@probe(
    "torch", "_functorch.is_functorch_wrapped_tensor", "calls.is_transformed",
    "to leave ids alone that vmap holds, or within a gradient of torch.func",
)  # fmt: skip
def _transforms_wrap_tensors() -> bool:
    seen: list[bool] = []
    ids = torch.arange(4)
    wraps = torch._C._functorch.is_functorch_wrapped_tensor
    torch.func.vmap(lambda x: seen.append(wraps(x)) or x)(ids)
    torch.func.grad(lambda x: seen.append(wraps(ids.detach())) or x)(torch.ones(()))
    return seen == [True, True] and not wraps(ids.detach())


@probe(
    "torch",
    "is_in_torch_dispatch_mode",
    "folding.Folding",
    "to fold a watched batch anew, as selective checkpointing expects",
)
def _modes_can_be_seen() -> bool:
    with TorchDispatchMode():
        inside = is_in_torch_dispatch_mode()
    return inside and not is_in_torch_dispatch_mode()


@probe(
    "torch",
    "torch._dynamo.config.recompile_limit",
    "attention.many_recompiles",
    "to compile attention for every length",
)
def _recompiles_have_limits() -> bool:
    from torch._dynamo import config

    return isinstance(config.recompile_limit, int) and isinstance(config.accumulated_recompile_limit, int)


@probe("torch", "torch._dynamo.config.optimize_ddp", "attention.many_recompiles", "to keep a layer's graph whole")
def _graphs_are_split_by_buckets() -> bool:
    from torch._dynamo import config

    return config.optimize_ddp is True


@probe("torch", "torch._dynamo.exc.TorchDynamoException", "compiled._forward", "to say why layers do not compile")
def _errors_of_compiling_have_a_base() -> bool:
    from torch._dynamo import exc

    return issubclass(exc.Unsupported, exc.TorchDynamoException)


@probe(
    "torch", "BlockMask's tables and seq_lengths", "masks.block_mask", "to make block masks in O(L)",
    "torch.nn.attention.flex_attention.BlockMask",
)  # fmt: skip
def _block_masks_are_tables() -> bool:
    tables = {f"{kind}_{of}" for kind in ("kv", "full_kv", "q", "full_q") for of in ("num_blocks", "indices")}
    return {"seq_lengths", "BLOCK_SIZE", "mask_mod", *tables} <= set(
        inspect.signature(flex_attention.BlockMask).parameters
    )


@probe(
    "torch", "flex_attention's options, and AuxRequest(lse=True)",
    "attention.flex", "for soft caps, sinks and shared heads", "torch.nn.attention.flex_attention.AuxRequest",
)  # fmt: skip
def _flex_has_options() -> bool:
    options = {"score_mod", "block_mask", "scale", "enable_gqa", "kernel_options", "return_aux"}
    return bool(flex_attention.AuxRequest(lse=True).lse) and options <= set(
        inspect.signature(flex_attention.flex_attention).parameters
    )


@probe("torch", "segment_reduce", "logprobs.sum_answers", "to sum answers in a fixed order", "torch.segment_reduce")
def _sums_of_segments() -> bool:
    sums = torch.segment_reduce(torch.arange(5.0), "sum", lengths=torch.tensor([2, 3]), unsafe=True)
    return sums.tolist() == [1.0, 9.0]


@probe("torch", "_version, which counts writes to a tensor", "masks.version", "so that no stale mask is used")
def _writes_are_counted() -> bool:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor[0] = 1
    return tensor._version == before + 1


@probe("torch", "a BlockMask's shape of four entries", "row_calls.row_inputs", "so that transformers passes it through")
def _block_masks_have_four_dimensions() -> bool:
    mask = row_mask()
    return isinstance(mask, flex_attention.BlockMask) and len(mask.shape) == 4


@probe(
    "torch", "utils.checkpoint._checkpoint_debug_enabled", "selective.can_keep_products",
    "to leave checkpoints alone that are debugged, which take no contexts",
)  # fmt: skip
def _checkpoints_tell_that_they_are_debugged() -> bool:
    with torch.utils.checkpoint.set_checkpoint_debug_enabled(True):
        on = torch.utils.checkpoint._checkpoint_debug_enabled
    return on is True and torch.utils.checkpoint._checkpoint_debug_enabled is None
