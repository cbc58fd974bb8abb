"""Models to verify and to try: from a hub, a directory, a GGUF file, or a registered architecture's name."""

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flexpatch.errors import FlexpatchError
from flexpatch.patch import eager_experts
from flexpatch.registry import adapter_for, adapters

# What tiny models of every architecture have in common; an adapter's ``tiny`` entries override it.
TINY = dict(
    vocab_size=151,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def load_model(name: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in eval mode, on the CPU, with the attention its adapter prefers.

    Args:
        name: A hub name, a local directory, or a GGUF file (its weights are dequantized to ``dtype``).
        dtype: Of the weights.
        trust_remote_code: Run model code that comes with the weights.

    Raises:
        UnsupportedModelError: If the architecture is not supported; found out before any weight is read.
        OSError, ValueError, ImportError: From transformers, if there is no such model or it cannot be read.
    """
    source = _source(name)
    adapter = adapter_for(load_config(name, trust_remote_code=trust_remote_code))
    if "gguf_file" in source and Version(transformers.__version__) >= Version("5.17"):
        # From then on weights may stay packed, and even dense ones count as quantized, which trainers refuse.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=dtype,
        attn_implementation=adapter.implementations[0],
        trust_remote_code=trust_remote_code,
    )
    model = model.eval()
    return eager_experts(model) if dtype == torch.float64 else model


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of :func:`load_model`'s ``name``; no weights are read."""
    return AutoConfig.from_pretrained(**_source(name), trust_remote_code=trust_remote_code)


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to :func:`load_model`'s ``name``."""
    return AutoTokenizer.from_pretrained(**_source(name))


def _source(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FlexpatchError(f"there is no GGUF file {name}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def tiny_types() -> list[str]:
    """The model types that adapters serve and the installed transformers knows."""
    return [model_type for model_type in adapters() if model_type in CONFIG_MAPPING]


def tiny_model(
    model_type: str, variant: int = 0, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A small random model of a registered architecture, in eval mode, on the CPU.

    The matrices are drawn with a standard deviation of 0.15 instead of 0.02: a model at its usual initialisation
    predicts almost uniformly and hides errors.

    Args:
        model_type: One of :func:`tiny_types`.
        variant: Which of the adapter's ``tiny`` configurations.
        dtype: Of the weights.
        seed: Of the weights.
    """
    adapter = adapters()[model_type]
    settings = dict(adapter.tiny[model_type][variant])
    if "text_config" in settings:
        settings["text_config"] = TINY | settings["text_config"]
    else:
        settings = TINY | settings
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some vectors (gpt-oss's sinks) are drawn by the model itself
        model = AutoModelForCausalLM.from_config(config, attn_implementation=adapter.implementations[0])
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Norms start at 1, those of each head as matrices: drawn anew, they would shrink queries and keys to nothing.
        if parameter.ndim > 1 and not (parameter == 1).all():
            nn.init.normal_(parameter, std=0.15, generator=generator)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model = model.to(dtype).eval()
    return eager_experts(model) if dtype == torch.float64 else model
