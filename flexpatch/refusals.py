"""What would be inexact in a model's present mode: refused at the call, with the way out."""

from typing import Any

from torch import nn

from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.registry import ropes
from flexpatch.tree import Rows


def check_mode(model: nn.Module) -> None:
    """Refuse modules that do not act on each token alone.

    Raises:
        UnsupportedModelError: For active dropout, NEFTune noise, or peft adapters that look at whole rows.
    """
    for name, module in model.named_modules():
        # Attention layers keep the rate they were built with, whatever the configuration says by now.
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if rate and module.training:
            raise UnsupportedModelError(
                f"dropout {rate} in '{name}' is active: answers would share one draw on shared tokens, which the "
                "unpatched model does not. Set it to 0.0 (for LoRA: LoraConfig(lora_dropout=0.0))"
            )
        if module.training and getattr(module, "neftune_noise_alpha", None):
            raise UnsupportedModelError(
                f"NEFTune noise on '{name}' is active: its size depends on the length of a row, and answers would "
                "share one draw. Leave neftune_noise_alpha unset"
            )
        for adapter, settings in getattr(module, "peft_config", {}).items():
            if settings.is_prompt_learning or getattr(settings, "alora_invocation_tokens", None):
                raise _whole_rows(f"'{adapter}' ({settings.peft_type})")
        # A folded batch is seen by the backbone alone, above which peft keeps its settings.
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if type(variant).__name__.startswith("ALora"):
                raise _whole_rows(f"'{adapter}' (aLoRA)")


def _whole_rows(adapter: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"peft adapter {adapter} adds tokens to a row or looks for some in it, once for all answers. Use one that acts "
        "on each token alone, such as LoRA"
    )


def check_rows(config: Any, rows: Rows) -> None:
    """Refuse rows that this model cannot run exactly.

    Raises:
        FlexpatchError: For ids outside the vocabulary, naming the sample.
        UnsupportedModelError: For router auxiliary losses, or sequences on both sides of longrope's switching length.
    """
    for sample, largest in zip(rows.samples, rows.largest_ids, strict=True):
        if largest >= config.vocab_size:
            raise FlexpatchError(
                f"sample {sample}: id {largest} is outside the vocabulary of {config.vocab_size} tokens"
            )
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            "output_router_logits=True: the router's auxiliary loss would weigh a shared prompt once instead of once "
            "for each answer. Set model.config.output_router_logits = False"
        )
    if (limit := longrope_limit(config)) is not None:
        shortest = min([*rows.sequence_lengths, rows.depth])
        if shortest <= limit < rows.depth:
            raise UnsupportedModelError(
                f"longrope switches its frequencies at {limit} tokens for the whole call, but these sequences have "
                f"{shortest} to {rows.depth}: put shorter and longer ones in separate rows"
            )


def longrope_limit(config: Any) -> int | None:
    """Length above which longrope uses other frequencies for a whole call; ``None`` without longrope."""
    longrope = ropes(config).get("longrope")
    return None if longrope is None else longrope["original_max_position_embeddings"]
