"""Models to verify and to try: from a hub, a directory, a GGUF file, or a registered architecture's name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from flexpatch.errors import FlexpatchError, UnsupportedModelError, first_line
from flexpatch.internals import eager_experts
from flexpatch.registry import adapter_for, adapters, refused_types, unknown

SAFE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

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


def load_model(
    name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> PreTrainedModel:
    """A causal language model in eval mode, on the CPU, with the attention its adapter prefers.

    Args:
        name: A hub name, a local directory, or a GGUF file (its weights are dequantized to ``dtype``).
        dtype: Of the weights.
        trust_remote_code: Run model code that comes with the weights.
        allow_pickle: Read weights that are pickles, which may run code, where there are no safetensors.

    Raises:
        UnsupportedModelError: If the architecture is not supported; found out before any weight is read.
        FlexpatchError: If there is no such model, it cannot be read, lacks weights, or has them in pickles.
    """
    source = _source(name)
    adapter = adapter_for(load_config(name, trust_remote_code=trust_remote_code))
    if "gguf_file" in source and Version(transformers.__version__) >= Version("5.17"):
        # From then on weights may stay packed, and even dense ones count as quantized, which trainers refuse.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if "gguf_file" not in source and not allow_pickle:
        _check_weights(name)
        source["use_safetensors"] = True
    with _loading(name):
        model, found = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=dtype,
            attn_implementation=adapter.implementations[0],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random, and logs it
        raise FlexpatchError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    model = model.eval()
    return eager_experts(model) if dtype == torch.float64 else model


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of :func:`load_model`'s ``name``; no weights are read.

    Raises:
        FlexpatchError: If there is none, or it cannot be read.
    """
    source = _source(name)
    with _loading(name):
        return AutoConfig.from_pretrained(**source, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to :func:`load_model`'s ``name``.

    Raises:
        FlexpatchError: If there is none, or it cannot be read.
    """
    source = _source(name)
    with _loading(name):
        # Never None: transformers would ask on the terminal whether to run the code.
        return AutoTokenizer.from_pretrained(**source, trust_remote_code=trust_remote_code)


def _source(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FlexpatchError(f"there is no GGUF file {name}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if not name.strip() or path.is_file():
        raise FlexpatchError(f"{name!r} is no model; expected a hub name, a directory or a GGUF file")
    return {"pretrained_model_name_or_path": name}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Whatever transformers raises for a model it cannot load, as one line that names the model."""
    try:
        yield
    except FlexpatchError:
        raise
    except Exception as error:
        raise FlexpatchError(f"cannot load {name}: {type(error).__name__}: {first_line(error)}") from error


def _check_weights(name: str) -> None:
    """Refuse weights that are pickles, or that name some.

    ``use_safetensors=True`` alone does not: transformers reads the files that an index or the configuration names, and
    the weights of an adapter that lies with the model, whatever they are.

    Raises:
        FlexpatchError: Naming the file.
    """
    names = {str(_json(name, "config.json").get("transformers_weights") or SAFE)}
    with _loading(name):
        names |= set(map(str, _json(name, f"{SAFE}.index.json").get("weight_map", {}).values()))
    if _json(name, "adapter_config.json") and _file(name, "adapter_model.safetensors") is None:
        names.add("adapter_model.bin")
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        names |= {path.name for path in Path(name).iterdir() if path.suffix in PICKLED}
    for file in sorted(names):
        if not file.endswith((".safetensors", ".safetensors.index.json")):
            raise FlexpatchError(
                f"{name} has weights in {file}: pickles may run code when they are read. Convert it to safetensors, or "
                "allow it with allow_pickle=True (--allow-pickle)"
            )


def _json(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a model; empty if there is none."""
    path = _file(name, file)
    if path is None:
        return {}
    with _loading(name):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no JSON object")
    return content


def _file(name: str, file: str) -> str | None:
    """The path of a model's file, fetched from the hub if need be; ``None`` if there is none."""
    try:
        return cached_file(name, file)
    except OSError:
        return None


def check_architecture(name: str) -> None:
    """Refuse the name of an architecture that cannot be verified, before a hub is asked for a model of that name.

    Args:
        name: What a user asked for; names of models are none of this function's business.

    Raises:
        UnsupportedModelError: If no adapter serves the architecture ``name``, with the reason.
        FlexpatchError: If one does, but the installed transformers does not.
    """
    if reason := refused_types().get(name):
        raise UnsupportedModelError(f"model type '{name}': {reason}")
    if name in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # some have no configuration by default
            raise unknown(name) from None
        adapter_for(config)
    elif name in adapters():
        raise FlexpatchError(f"transformers {transformers.__version__} has no model type '{name}' yet: upgrade it")


def similar_architecture(name: str) -> str | None:
    """The architecture whose name is most like ``name``, if any is."""
    plain = name.lower().replace("-", "_")
    known = [*adapters(), *refused_types(), *CONFIG_MAPPING]
    return next(iter(get_close_matches(plain, known, 1, cutoff=0.8)), None)


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
