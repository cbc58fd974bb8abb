"""Let the host of a packed trainer run ahead of its GPU, which then has kernels to run while the host prepares more.

A step of a 7B model has 60 to 150 ms of work for the host: of the trainer, of peft, of the hooks of a fold. A host that
waits for the GPU, in the middle of a step or at its end, lets it idle for as long. transformers' loop waits at each
step, to see whether the loss is a number; data loaders wait when they copy a batch to the GPU; a fold waits when it
copies the batch back; TRL's DPO waits for the policy's pass before it prepares the reference's.
"""

from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer

from flexpatch.host_copies import remember


class RunsAhead(Trainer):
    """Base of packed trainers: a trainer that waits for the GPU once a step, when TRL takes the step's metrics.

    Its numbers are the trainer's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finite = False
        self._passes_filter = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the step's micro-batches on the device, whose ids the host still knows."""
        batches, samples = super().get_batch_samples(*args, **kwargs)
        return [move(batch, self.accelerator.device) for batch in batches], samples

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients, and spare the training loop its look at a loss that is known to be a number."""
        self._finite = False
        loss = super().training_step(*args, **kwargs)
        if self._finite and self.args.logging_nan_inf_filter and self._makes_the_loss():
            self.args.logging_nan_inf_filter = False
            self._passes_filter = True
        return loss

    def floating_point_ops(self, inputs: Any) -> Any:
        """Count operations as the trainer does. The loop asks for them right after its look at the loss."""
        if self._passes_filter:
            self.args.logging_nan_inf_filter = True
            self._passes_filter = False
        return super().floating_point_ops(inputs)

    def look_at(self, loss: Tensor) -> None:
        """Note whether a loss is a number, at a time when the GPU has just finished it: TRL took its metrics."""
        self._finite = bool(loss.detach().isfinite().all())

    def _makes_the_loss(self) -> bool:
        """Tell whether the loop gets the loss that was looked at, and not another of a class derived from this one."""
        return all(method.__module__.startswith("flexpatch.") for method in (self.compute_loss, self.training_step))


class ReferenceFirst(Trainer):
    """Mixin for a DPOTrainer that computes the reference's log-probs of a batch before the policy's.

    TRL computes them behind the policy's, after it has waited for these. Before them the host prepares the reference
    while the GPU still works on the step before. TRL reads them as it reads those that were computed before training.
    """

    _may_precede: bool | None = None  # under FSDP, known behind the policy's first forward

    def get_train_dataloader(self) -> DataLoader:
        """Make the loader that a training starts with. Before it, an engine may have taken the model anew."""
        self._may_precede = None
        return super().get_train_dataloader()

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the stock trainer's loss."""
        compute: Any = super().compute_loss  # type: ignore[safe-super]
        if not (self.model.training and self._precedes()):
            loss = compute(model, inputs, *args, **kwargs)
            if self.model.training and self.is_fsdp_enabled and self._may_precede is None:
                self._may_precede = switches_in_shards(model, self.accelerator)
            return loss
        chosen, rejected = self.compute_ref_log_probs(self.ref_model, inputs)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True  # for this batch
        try:
            return compute(model, inputs, *args, **kwargs)
        finally:
            self.precompute_ref_logps = False

    def _precedes(self: Any) -> bool:
        """Tell whether the order makes no difference to anybody, and TRL has a method for the reference.

        FSDP2 settles by a model's first forward which weights are trained, and in which dtype: that must be the
        policy's. DeepSpeed's ZeRO-3 keeps a trace of forwards. A loss of Liger's reads the reference itself. Before
        TRL 1.9 the method takes no model.
        """
        if self.is_deepspeed_enabled or self.args.use_liger_kernel or (self.is_fsdp_enabled and not self._may_precede):
            return False
        if self.precompute_ref_logps or self.ref_model is None:
            return False
        return "model" in signature(self.compute_ref_log_probs).parameters


def switches_in_shards(model: nn.Module, accelerator: Accelerator) -> bool:
    """Tell whether peft finds the shards of all trained weights in the model, before each forward and behind it.

    FSDP2 leaves the model's own unit whole behind its forward, and all units without ``reshard_after_forward``. There
    peft, which switched adapters off in the shards, would switch them on in the whole weights, and leave the shards
    frozen.

    Args:
        model: Of a trainer, prepared.
        accelerator: Of the trainer.

    Returns:
        ``False`` too if FSDP2 does not shard the model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "reshard_after_forward", False) is not True:  # FSDP1 has a strategy there
        return False
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inside = {id(parameter) for unit in units[1:] for parameter in unit.parameters()}  # the first is the model's own
    return all(id(parameter) in inside for parameter in model.parameters() if parameter.requires_grad)


def prepare(accelerator: Accelerator, loader: DataLoader) -> DataLoader:
    """Prepare a loader whose batches :func:`move` brings to the device.

    Args:
        accelerator: Of the trainer.
        loader: Its batches are on the host.

    Returns:
        The loader, for all ranks. One whose first rank hands out batches, and DeepSpeed's, copy them themselves.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED or accelerator.dispatch_batches:
        return accelerator.prepare(loader)
    return accelerator.prepare_data_loader(loader, device_placement=False)


def move(batch: Any, device: torch.device) -> Any:
    """Copy a batch to a device while the host goes on, and let the host remember its ids.

    Args:
        batch: Tensors by name, in pinned memory if the host is not to wait.
        device: The device.

    Returns:
        The batch there.
    """
    if device.type == "cpu":
        return batch
    moved = send_to_device(batch, device, non_blocking=device.type == "cuda")
    for name, tensor in batch.items():
        if isinstance(tensor, Tensor) and tensor.ndim == 2 and not tensor.is_floating_point() and tensor.is_cpu:
            remember(moved[name], tensor)
    return moved
