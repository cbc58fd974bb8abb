"""Tiny models whose layers bitsandbytes has quantized."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from flexpatch.models import TINY, tiny_model

WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32)  # bitsandbytes packs blocks of 64
SIZES = {"bamba": dict(intermediate_size=256)}  # its hidden states are as wide as its record's heads want
FOUR = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR,
    "nf4, double": dict(FOUR, bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True, llm_int8_threshold=0.0),
}


def quantized(
    settings: dict[str, Any], folder: Path, *, model_type: str = "llama", dtype: torch.dtype, device: str = "cpu"
) -> nn.Module:
    """A tiny model, written and loaded with its layers quantized, under LoRA adapters that matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.models.TINY", TINY | SIZES.get(model_type, WIDE))
        tiny_model(model_type, dtype=dtype).save_pretrained(folder)
    if "load_in_4bit" in settings:
        settings = dict(settings, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), dtype=dtype, device_map={"": device}
    )
    # On a CPU bitsandbytes has other code for training than for inference: gradients go through 4-bit weights in the
    # one, activations are rounded to 8 bits in the other.
    model.train("load_in_4bit" in settings)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora)


@contextlib.contextmanager
def quiet() -> Any:
    """Without a line for every 8-bit product."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
