"""Run a trainer's policy without its adapters, as the reference, and let the GPU wait less for it.

TRL's trainers switch adapters off by peft's context. It first reports on all layers, which takes tens of milliseconds
of a 7B model's step in which the GPU has nothing to do: TRL has just waited for the policy's pass.
"""

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


class WithoutAdapters:
    """The reference of a trainer: its policy with the adapters off. TRL's trainers call it as a reference model.

    Args:
        trainer: A trainer of transformers.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the policy."""
        model: Any = self.trainer.model
        peft_model: Any = self.trainer.accelerator.unwrap_model(model)
        if _is_off(peft_model):  # by the user: peft's context leaves it so
            with peft_model.disable_adapter():
                return model(*args, **kwargs)
        peft_model.base_model.disable_adapter_layers()
        try:
            return model(*args, **kwargs)
        finally:
            peft_model.base_model.enable_adapter_layers()


def _is_off(model: nn.Module) -> bool:
    """Tell whether any adapter is switched off."""
    return any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))


def make_reference(trainer: Any) -> None:
    """Give a trainer whose reference is its policy without adapters a :class:`WithoutAdapters` for ``ref_model``.

    Learned prompts have no layers to switch off, and an adapter named "ref" is the reference: both stay TRL's matter.

    Args:
        trainer: A trainer of TRL, after it was built.
    """
    if getattr(trainer, "ref_model", trainer) is not None or trainer.args.precompute_ref_log_probs:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel) or "ref" in model.peft_config or not isinstance(model.base_model, BaseTuner):
        return
    if not any(config.is_prompt_learning or config.is_adaption_prompt for config in model.peft_config.values()):
        trainer.ref_model = WithoutAdapters(trainer)
