"""Loads models to verify: from a hub, a directory or a GGUF file, or tiny random models of an architecture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import cached_file

from flexpatch.errors import FlexpatchError, UnsupportedModelError, first_line
from flexpatch.internals import eager_experts
from flexpatch.layouts import multimodal_types
from flexpatch.registry import Adapter, adapter_for, adapters, refused_types, too_old, unknown

SAFE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Settings of the tiny models of every architecture. An adapter's ``tiny`` entries override them.
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
    """Load a causal language model in eval mode, on the CPU, with the attention that its adapter prefers.

    Args:
        name: A hub name, a local directory, or a GGUF file (its weights are dequantized to ``dtype``).
        dtype: Dtype of the weights.
        trust_remote_code: Run model code that comes with the weights.
        allow_pickle: Read weights that are pickles, which may run code, if there are no safetensors.

    Returns:
        The model, not yet patched.

    Raises:
        UnsupportedModelError: If the architecture is not supported. Raised before any weight is read.
        FlexpatchError: If the model does not exist, cannot be read, lacks weights, or has its weights in pickles.
    """
    source = _source(name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    adapter = adapter_for(config)
    multimodal = config.get_text_config() is not config and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    if "gguf_file" in source and Version(transformers.__version__) >= Version("5.17"):
        # Since 5.17 weights may stay packed. Even dense weights then count as quantized, which trainers refuse.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if "gguf_file" not in source and not allow_pickle:
        _check_weights(name)
        source["use_safetensors"] = True
    with _loading(name):
        model, found = auto.from_pretrained(
            **source,
            dtype=dtype,
            attn_implementation=adapter.implementations[0],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):  # transformers draws these at random, and only logs it
        raise FlexpatchError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    model = model.eval()
    return eager_experts(model) if dtype == torch.float64 else model


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a model. No weights are read.

    Args:
        name: A hub name, a local directory or a GGUF file.
        trust_remote_code: Run code that comes with the configuration.

    Returns:
        The configuration, as transformers has it.

    Raises:
        FlexpatchError: If there is no configuration, or it cannot be read.
    """
    source = _source(name)
    with _loading(name):
        return AutoConfig.from_pretrained(**source, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model, as transformers has it.

    Args:
        name, trust_remote_code: As in :func:`load_config`.

    Returns:
        The tokenizer.

    Raises:
        FlexpatchError: If there is no tokenizer, or it cannot be read.
    """
    source = _source(name)
    with _loading(name):
        # Not None, with which transformers asks on the terminal whether to run the code.
        return AutoTokenizer.from_pretrained(**source, trust_remote_code=trust_remote_code)


def _source(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FlexpatchError(f"there is no GGUF file {name}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if not name.strip() or path.is_file():
        raise FlexpatchError(f"{name!r} is not a model; expected a hub name, a directory or a GGUF file")
    return {"pretrained_model_name_or_path": name}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn the errors of transformers for a model that cannot be loaded into one line that names the model."""
    try:
        yield
    except FlexpatchError:
        raise
    except Exception as error:
        raise FlexpatchError(f"cannot load {name}: {type(error).__name__}: {first_line(error)}") from error


def _check_weights(name: str) -> None:
    """Refuse weights that are pickles, and indices and configurations that name pickles.

    ``use_safetensors=True`` does not suffice: transformers also reads the files that an index or the configuration
    names, and the weights of an adapter beside the model, in any format.

    Raises:
        FlexpatchError: For a pickle. The message names the file.
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
    """Read a JSON file of a model; a file that does not exist is empty."""
    path = _file(name, file)
    if path is None:
        return {}
    with _loading(name):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no JSON object")
    return content


def _file(name: str, file: str) -> str | None:
    """Find the path of a model's file, and fetch the file from the hub if needed; ``None`` if there is no such file."""
    try:
        return cached_file(name, file)
    except OSError:
        return None


def check_architecture(name: str) -> None:
    """Refuse the name of an architecture that cannot be verified, before a hub is asked for a model of that name.

    Args:
        name: A name that a user gave. Names that are no architecture's pass.

    Raises:
        UnsupportedModelError: If no adapter serves the architecture ``name``. The message gives the reason.
        FlexpatchError: If an adapter serves the architecture, but the installed transformers does not have it.
    """
    if reason := refused_types().get(name):
        raise UnsupportedModelError(f"model type '{name}': {reason}")
    if (media := multimodal_types().get(name)) is not None and (lacking := media.lacking()):
        raise FlexpatchError(f"model type '{name}' needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    if name in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # some architectures have no default configuration
            raise unknown(name) from None
        adapter_for(config)
    elif name in adapters() or name in multimodal_types():
        raise FlexpatchError(f"transformers {transformers.__version__} has no model type '{name}' yet: upgrade it")


def similar_architecture(name: str) -> str | None:
    """Find the architecture whose name is most like ``name``; ``None`` if no name is like it."""
    plain = name.lower().replace("-", "_")
    known = [*adapters(), *multimodal_types(), *refused_types(), *CONFIG_MAPPING]
    return next(iter(get_close_matches(plain, known, 1, cutoff=0.8)), None)


def tiny_types() -> list[str]:
    """List the types that the installed transformers has: of text models, and of multimodal classes around them."""
    text = [t for t, adapter in adapters().items() if t in CONFIG_MAPPING and too_old(adapter) is None]
    return [*text, *(t for t, m in multimodal_types().items() if t in CONFIG_MAPPING and not m.lacking())]


def variants(model_type: str) -> Sequence[Mapping[str, Any]]:
    """Return the settings of the tiny models of one of :func:`tiny_types`."""
    table: Mapping[str, Any] = adapters()
    return (table[model_type] if model_type in table else multimodal_types()[model_type]).tiny[model_type]


def adapter_of(model_type: str) -> Adapter:
    """Return the record of one of :func:`tiny_types`: of a multimodal class that of its text model."""
    known = adapters()
    return known.get(model_type) or known[tiny_config(model_type).get_text_config().model_type]


def tiny_config(model_type: str, variant: int = 0) -> Any:
    """Make the configuration of :func:`tiny_model`.

    Args:
        model_type, variant: As there.

    Returns:
        A configuration, as transformers has it.
    """
    settings = dict(variants(model_type)[variant])
    model_type = settings.pop("model_type", model_type)  # of a text model without a class of its own
    if "text_config" in settings:
        settings["text_config"] = TINY | settings["text_config"]
    else:
        kind = CONFIG_MAPPING[model_type]
        # A property without a setter: Falcon's head_dim.
        read_only = {name for name in TINY if getattr(getattr(kind, name, None), "fset", True) is None}
        settings = {name: value for name, value in TINY.items() if name not in read_only} | settings
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(
    model_type: str, variant: int = 0, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """Make a small random model of a registered architecture, in eval mode, on the CPU.

    Matrices are drawn with a standard deviation of 0.15 instead of 0.02: a model with the usual initialisation predicts
    almost uniformly, which hides errors.

    Args:
        model_type: One of :func:`tiny_types`.
        variant: Index of one of the record's ``tiny`` configurations.
        dtype: Dtype of the weights.
        seed: Seed of the weights.

    Returns:
        The model, not yet patched, with the attention that its adapter prefers.
    """
    config = tiny_config(model_type, variant)
    adapter = adapter_for(config)
    # For a multimodal type the one for causal models may load the text model alone.
    multimodal = "text_config" in variants(model_type)[variant]
    multimodal = multimodal and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some vectors (gpt-oss's sinks) are drawn by the model itself
        model = auto.from_config(config, attn_implementation=adapter.implementations[0])
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Norms keep their ones, also norms of heads, which are matrices: small random norms would shrink queries and
        # keys to nothing.
        if parameter.ndim > 1 and not (parameter == 1).all():
            nn.init.normal_(parameter, std=0.15, generator=generator)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model = model.to(dtype).eval()
    return eager_experts(model) if dtype == torch.float64 else model
