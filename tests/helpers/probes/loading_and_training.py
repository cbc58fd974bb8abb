"""Facts about the rest of transformers: how models are loaded, set up, checkpointed and trained."""

import functools
import importlib
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from flexpatch import compiled, internals
from flexpatch.calls import CACHES
from flexpatch.models import TINY, tiny_model, tiny_types
from helpers.probes.table import probe


def checkpointed(use_reentrant: bool = False) -> transformers.PreTrainedModel:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@probe(
    "transformers", "PreTrainedModel.set_attn_implementation",
    "internals.set_attention", "to put its attention into every layer",
    "transformers.PreTrainedModel.set_attn_implementation",
)  # fmt: skip
def _sets_attention() -> bool:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    return bool(model.model.config._attn_implementation == "eager")


@probe("transformers", "utils.cached_file", "models.load_model", "to look at a model's files before they are loaded")
def _finds_files() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text("{}", encoding="utf-8")
        return bool(transformers.utils.cached_file(folder, path.name) == str(path))


@probe(
    "transformers",
    "config._attn_implementation",
    "internals.attention_name",
    "to keep its settings, and to find them again",
)
def _config_names_attention() -> bool:
    return bool(tiny_model("llama").config._attn_implementation == "sdpa")


@probe(
    "transformers", "PreTrainedModel.base_model", "patch.apply", "to hang its hooks on the backbone",
    "transformers.PreTrainedModel.base_model",
)  # fmt: skip
def _has_backbone() -> bool:
    model = tiny_model("llama")
    return model.base_model is model.model


@probe(
    "transformers", "PreTrainedModel.from_pretrained and _from_config, class methods through which all models are made",
    "autopatch.install", "to patch them in programs that launch starts",
    "transformers.PreTrainedModel._from_config",
)  # fmt: skip
def _models_are_made_by_two_methods() -> bool:
    methods = vars(transformers.PreTrainedModel)
    made = transformers.AutoModelForCausalLM.from_config(tiny_model("llama").config)
    return type(made).__name__ == "LlamaForCausalLM" and all(
        isinstance(methods[name], classmethod) for name in ("from_pretrained", "_from_config")
    )


@probe(
    "transformers", "_active_collector.compiling and global_var, where recorded outputs go while a layer compiles",
    "compiled.compile_layers", "to collect router logits from compiled layers",
    "transformers.utils.output_capturing._active_collector.global_var", since="5.2",
)  # fmt: skip
def _outputs_are_recorded_by_a_global_while_compiling() -> bool:
    collector, model = internals.COLLECTOR, tiny_model("qwen3_moe")
    model(torch.tensor([[3, 4]]), output_router_logits=True)
    recorded: dict[str, list[torch.Tensor]] = {compiled.ROUTERS: []}
    before = collector.compiling, collector.global_var
    collector.compiling, collector.global_var = True, recorded
    try:
        model.model.layers[0].mlp(torch.zeros(1, 2, model.config.hidden_size, dtype=model.dtype))
    finally:
        collector.compiling, collector.global_var = before
    return len(recorded[compiled.ROUTERS]) == 1 and not collector.compiling


@probe(
    "transformers", "get_input_embeddings", "internals.device_of", "to know the device that a model computes on",
    "transformers.modeling_utils.EmbeddingAccessMixin.get_input_embeddings",
)  # fmt: skip
def _has_embeddings() -> bool:
    model = tiny_model("llama")
    return model.get_input_embeddings() is model.model.embed_tokens


@probe(
    "transformers", "get_output_embeddings", "internals.head_of", "to make log-probs without logits of the prompt",
    "transformers.modeling_utils.EmbeddingAccessMixin.get_output_embeddings",
)  # fmt: skip
def _has_head() -> bool:
    model = tiny_model("llama")
    return model.get_output_embeddings() is model.lm_head


@probe(
    "transformers", "config.get_text_config", "internals.decoder_of", "to tell multimodal models",
    "transformers.PreTrainedConfig.get_text_config",
)  # fmt: skip
def _has_text_config() -> bool:
    config = tiny_model("llama").config
    return config.get_text_config() is config


@probe(
    "transformers",
    "the signature of a backbone's forward",
    "internals.arguments_of",
    "to name arguments given by position",
)
def _forward_has_a_signature() -> bool:
    names = list(inspect.signature(type(tiny_model("llama").model).forward).parameters)
    return names[:4] == ["self", "input_ids", "attention_mask", "position_ids"]


@probe(
    "transformers", f"a cache named {' or '.join(CACHES)}", "calls.without_cache", "to leave calls with a cache alone"
)
def _caches_have_known_names() -> bool:
    model = tiny_model("llama").model
    with torch.no_grad():
        output = model(torch.tensor([[3, 4]]), use_cache=True)
        given = [name for name in CACHES if name in inspect.signature(type(model).forward).parameters]
    return bool(given) and any(output.get(name) is not None for name in CACHES)


@probe(
    "transformers", "PreTrainedModel.dequantize", "internals.dequantize", "to hold quantized models to a truth",
    "transformers.PreTrainedModel.dequantize",
)  # fmt: skip
def _models_dequantize() -> bool:
    return callable(transformers.PreTrainedModel.dequantize)


@probe(
    "transformers", "GradientCheckpointingLayer.gradient_checkpointing", "checkpointing.Recomputation",
    "to choose which layers are recomputed",
    "transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing",
)  # fmt: skip
def _layers_have_a_flag() -> bool:
    """The one whose flag is off runs once, the other again in backward."""
    assert GradientCheckpointingLayer.gradient_checkpointing is False
    model, calls = checkpointed(), [0, 0]

    def count(i: int, *_: Any) -> None:
        calls[i] += 1

    for i, layer in enumerate(model.model.layers[:2]):
        layer.mlp.register_forward_pre_hook(functools.partial(count, i))
    model.model.layers[0].gradient_checkpointing = False
    model(torch.tensor([[3, 4, 5]]), use_cache=False).logits.sum().backward()
    return calls == [1, 2]


@probe(
    "transformers", "_gradient_checkpointing_func, a partial with use_reentrant", "refusals._is_reentrant",
    "to refuse reentrant checkpointing of layers that share keys and values",
    "transformers.PreTrainedModel._set_gradient_checkpointing",
)  # fmt: skip
def _checkpointing_is_a_partial() -> bool:
    """Of a module with the flag; it is read from the module's own attributes."""
    has = [vars(checkpointed(reentrant).model.layers[0]) for reentrant in (True, False)]
    return [
        (x["gradient_checkpointing"], x["_gradient_checkpointing_func"].keywords["use_reentrant"]) for x in has
    ] == [
        (True, True),
        (True, False),
    ]


@probe(
    "transformers", "_gradient_checkpointing_func, a partial of torch's checkpoint", "selective.can_keep_products",
    "to let layers keep their products", "transformers.PreTrainedModel._set_gradient_checkpointing",
)  # fmt: skip
def _checkpointing_is_torchs_own() -> bool:
    function = checkpointed().model.layers[0]._gradient_checkpointing_func
    return function.func is torch.utils.checkpoint.checkpoint and not function.args


@probe(
    "transformers", "_gradient_checkpointing_func, which is called with the layer's forward", "carrying.Now",
    "to let layers find their row as they are recomputed",
)  # fmt: skip
def _checkpointing_takes_a_forward() -> bool:
    layer, calls = checkpointed(False).model.layers[0], []
    function = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda forward, *args: (
        calls.append(callable(forward)) or function(forward, *args)
    )
    model = checkpointed(False)
    model.model.layers[0] = layer
    model.train()(torch.tensor([[3, 4, 5]]), use_cache=False).logits.sum().backward()
    return calls == [True]


@probe(
    "transformers", "neftune_noise_alpha, of embeddings", "refusals.check_mode", "to refuse NEFTune",
    "transformers.integrations.neftune.activate_neftune", "5.17",
)  # fmt: skip
def _neftune_leaves_a_trace() -> bool:
    model = tiny_model("llama")
    importlib.import_module("transformers.integrations.neftune").activate_neftune(model, 5.0)
    return vars(model.get_input_embeddings()).get("neftune_noise_alpha") == 5.0


@probe(
    "transformers", "PreTrainedModel._can_set_experts_implementation", "internals.eager_experts",
    "to run mixtures of experts in float64, for parity",
    "transformers.PreTrainedModel._can_set_experts_implementation",
)  # fmt: skip
def _experts_can_be_set() -> bool:
    can = {name: tiny_model(name)._can_set_experts_implementation() for name in ("mixtral", "llama")}
    tiny_model("mixtral").set_experts_implementation("eager")
    return can == {"mixtral": True, "llama": False}


@probe(
    "transformers", "modules of experts, named so", "verification.Verification",
    "to check leaks by derivatives of routed tokens", since="5.17",
)  # fmt: skip
def _experts_are_named() -> bool:
    routed = [name for name in tiny_types() if "moe" in name or name in ("mixtral", "gpt_oss", "deepseek_v3")]
    return bool(routed) and all(any("experts" in n for n, _ in tiny_model(name).named_modules()) for name in routed)


@probe(
    "transformers", "CONFIG_MAPPING and AutoConfig.for_model", "models.tiny_model", "to make tiny models by their type"
)
def _configs_by_type() -> bool:
    config = transformers.AutoConfig.for_model("llama", **TINY)
    return "llama" in transformers.CONFIG_MAPPING and config.hidden_size == TINY["hidden_size"]


@probe(
    "transformers",
    "Trainer.current_gradient_accumulation_steps",
    "trl.PackedDPOTrainer.compute_loss",
    "to weigh micro-batches by their pairs",
)
def _trainer_counts_micro_batches() -> bool:
    methods = filter(inspect.isfunction, vars(transformers.Trainer).values())
    return any("current_gradient_accumulation_steps" in method.__code__.co_names for method in methods)


@probe(
    "transformers", "Trainer.get_batch_samples(epoch_iterator, num_batches, device)",
    "trl.PackedDPOTrainer.get_batch_samples", "to count a step's pairs", "transformers.Trainer.get_batch_samples",
)  # fmt: skip
def _trainer_gets_batches() -> bool:
    names = list(inspect.signature(transformers.Trainer.get_batch_samples).parameters)
    return names == ["self", "epoch_iterator", "num_batches", "device"]


@probe(
    "transformers", "TrainerCallback.on_log and TrainerState.log_history",
    "callbacks.SavingsCallback.on_log", "to add savings to a log entry", "transformers.TrainerCallback.on_log",
)  # fmt: skip
def _callbacks_see_logs() -> bool:
    return callable(transformers.TrainerCallback.on_log) and transformers.TrainerState().log_history == []


@probe(
    "transformers", "is_kv_shared_layer", "refusals.check_mode", "to refuse reentrant checkpointing of Gemma 3n and 4"
)
def _says_which_layers_share() -> bool:
    types = [name for name in ("gemma3n_text", "gemma4_text") if name in tiny_types()]
    shares = [any(vars(m).get("is_kv_shared_layer") for m in tiny_model(name).modules()) for name in types]
    return len(shares) > 0 and all(shares)


@probe("transformers", "jitter_noise, of Mixtral's experts", "refusals.check_mode", "to refuse router noise")
def _mixtral_keeps_its_noise() -> bool:
    return any("jitter_noise" in vars(module) for module in tiny_model("mixtral").modules())
