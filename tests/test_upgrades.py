"""What flexpatch relies on beyond public promises, by name: the first tests to fail under a new release.

Each entry names an internal, the file that relies on it and why. Where it is gone or changed, its test fails with that
sentence. What attention functions, masks, ropes and backbones promise is in test_internals.py, for every architecture.
Of the files, patch.py alone imports transformers' internals; the lists below say what private names each file reads,
and no file may read another without an entry here.
"""

import ast
import functools
import importlib
import inspect
import re
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from packaging.version import Version
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils.data import DataLoader
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from flexpatch.calls import CACHES
from flexpatch.internals import layers_of, text_config
from flexpatch.models import TINY, tiny_model, tiny_types
from flexpatch.registry import adapters
from flexpatch.tuners import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FILES = sorted((Path(__file__).resolve().parent.parent / "flexpatch").glob("*.py"))
NAME = "test_upgrades_probe"


class Internal(NamedTuple):
    """``holds`` returns whether ``name`` of ``package`` is as ``file`` needs it, or raises; ``gone`` is a dotted path
    without which it cannot; ``since`` is the release from which on it is found there, under other names before."""

    package: str
    name: str
    file: str
    why: str
    holds: Callable[[], bool]
    gone: str = ""
    since: str = "0"

    def skip_old(self) -> None:
        if Version(metadata.version(self.package)) < Version(self.since):
            pytest.skip(f"{self.package} before {self.since} has it under another name")

    def check(self) -> None:
        self.skip_old()
        try:
            held, how = self.holds(), ""
        except Exception as error:
            held, how = False, f" ({type(error).__name__}: {error})"
        if not held:
            pytest.fail(
                f"{self.package} {metadata.version(self.package)}: {self.name} is gone or changed{how}. "
                f"flexpatch/{self.file}.py relies on it {self.why}",
                pytrace=False,
            )


INTERNALS: list[Internal] = []


def internal(package: str, name: str, file: str, why: str, gone: str = "", since: str = "0") -> Callable[..., Any]:
    """Adds a probe to the table."""

    def add(holds: Callable[[], bool]) -> Callable[[], bool]:
        INTERNALS.append(Internal(package, name, file, why, holds, gone, since))
        return holds

    return add


def checkpointed(use_reentrant: bool = False) -> transformers.PreTrainedModel:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


# --- transformers -----------------------------------------------------------------------------------------------------


@internal(
    "transformers", "PreTrainedModel.set_attn_implementation", "patch", "to put its attention into every layer",
    "transformers.PreTrainedModel.set_attn_implementation",
)  # fmt: skip
def _sets_attention() -> bool:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    return bool(model.model.config._attn_implementation == "eager")


@internal("transformers", "utils.cached_file", "models", "to look at a model's files before they are loaded")
def _finds_files() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text("{}", encoding="utf-8")
        return bool(transformers.utils.cached_file(folder, path.name) == str(path))


@internal("transformers", "config._attn_implementation", "patch", "to keep its settings, and to find them again")
def _config_names_attention() -> bool:
    return bool(tiny_model("llama").config._attn_implementation == "sdpa")


@internal(
    "transformers", "AttentionInterface.register", "patch", "to make its attention known",
    "transformers.modeling_utils.GeneralInterface.register",
)  # fmt: skip
def _registers_attention() -> bool:
    return _registers(AttentionInterface, ALL_ATTENTION_FUNCTIONS)


@internal(
    "transformers", "AttentionMaskInterface.register", "patch", "so that ordinary calls keep their masks",
    "transformers.modeling_utils.GeneralInterface.register",
)  # fmt: skip
def _registers_masks() -> bool:
    return _registers(AttentionMaskInterface, ALL_MASK_ATTENTION_FUNCTIONS)


def _registers(interface: Any, table: Any) -> bool:
    interface.register(NAME, _registers)
    try:
        return table[NAME] is _registers
    finally:
        type(table)._global_mapping.pop(NAME)


@internal(
    "transformers", "PreTrainedModel.base_model", "patch", "to hang its hooks on the backbone",
    "transformers.PreTrainedModel.base_model",
)  # fmt: skip
def _has_backbone() -> bool:
    model = tiny_model("llama")
    return model.base_model is model.model


@internal(
    "transformers", "get_input_embeddings", "patch", "to know the device that a model computes on",
    "transformers.modeling_utils.EmbeddingAccessMixin.get_input_embeddings",
)  # fmt: skip
def _has_embeddings() -> bool:
    model = tiny_model("llama")
    return model.get_input_embeddings() is model.model.embed_tokens


@internal(
    "transformers", "get_output_embeddings", "patch", "to make log-probs without logits of the prompt",
    "transformers.modeling_utils.EmbeddingAccessMixin.get_output_embeddings",
)  # fmt: skip
def _has_head() -> bool:
    model = tiny_model("llama")
    return model.get_output_embeddings() is model.lm_head


@internal(
    "transformers", "config.get_text_config", "patch", "to tell multimodal models",
    "transformers.PreTrainedConfig.get_text_config",
)  # fmt: skip
def _has_text_config() -> bool:
    config = tiny_model("llama").config
    return config.get_text_config() is config


@internal("transformers", "the signature of a backbone's forward", "patch", "to name arguments given by position")
def _forward_has_a_signature() -> bool:
    names = list(inspect.signature(type(tiny_model("llama").model).forward).parameters)
    return names[:4] == ["self", "input_ids", "attention_mask", "position_ids"]


@internal("transformers", f"a cache named {' or '.join(CACHES)}", "patch", "to leave calls with a cache alone")
def _caches_have_known_names() -> bool:
    model = tiny_model("llama").model
    with torch.no_grad():
        output = model(torch.tensor([[3, 4]]), use_cache=True)
        given = [name for name in CACHES if name in inspect.signature(type(model).forward).parameters]
    return bool(given) and any(output.get(name) is not None for name in CACHES)


@internal(
    "transformers", "PreTrainedModel.dequantize", "patch", "to hold quantized models to a truth",
    "transformers.PreTrainedModel.dequantize",
)  # fmt: skip
def _models_dequantize() -> bool:
    return callable(transformers.PreTrainedModel.dequantize)


@internal(
    "transformers", "GradientCheckpointingLayer.gradient_checkpointing", "patch",
    "to choose which layers are computed again",
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


@internal(
    "transformers", "_gradient_checkpointing_func, a partial with use_reentrant", "refusals",
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


@internal("transformers", "is_kv_shared_layer", "refusals", "to refuse reentrant checkpointing of Gemma 3n and 4")
def _says_which_layers_share() -> bool:
    types = [name for name in ("gemma3n_text", "gemma4_text") if name in tiny_types()]
    shares = [any(vars(m).get("is_kv_shared_layer") for m in tiny_model(name).modules()) for name in types]
    return len(shares) > 0 and all(shares)


@internal("transformers", "attention_dropout, of attention modules", "refusals", "to refuse active dropout")
def _attention_keeps_its_dropout() -> bool:
    models = [(layers_of(model.base_model), model.config.get_text_config()) for model in map(tiny_model, tiny_types())]
    return all(len(layers) == config.num_hidden_layers for layers, config in models) and all(
        any("attention_dropout" in vars(module) for module in layer.modules())
        for layers, _ in models
        for layer in layers
    )


@internal("transformers", "jitter_noise, of Mixtral's experts", "refusals", "to refuse router noise")
def _mixtral_keeps_its_noise() -> bool:
    return any("jitter_noise" in vars(module) for module in tiny_model("mixtral").modules())


@internal(
    "transformers", "neftune_noise_alpha, of embeddings", "refusals", "to refuse NEFTune",
    "transformers.integrations.neftune.activate_neftune", "5.17",
)  # fmt: skip
def _neftune_leaves_a_trace() -> bool:
    model = tiny_model("llama")
    importlib.import_module("transformers.integrations.neftune").activate_neftune(model, 5.0)
    return vars(model.get_input_embeddings()).get("neftune_noise_alpha") == 5.0


@internal(
    "transformers", "PreTrainedModel._can_set_experts_implementation", "patch",
    "to run mixtures of experts in float64, for parity",
    "transformers.PreTrainedModel._can_set_experts_implementation",
)  # fmt: skip
def _experts_can_be_set() -> bool:
    can = {name: tiny_model(name)._can_set_experts_implementation() for name in ("mixtral", "llama")}
    tiny_model("mixtral").set_experts_implementation("eager")
    return can == {"mixtral": True, "llama": False}


@internal(
    "transformers", "modules of experts, named so", "verification", "to check leaks by derivatives of routed tokens",
    since="5.17",
)  # fmt: skip
def _experts_are_named() -> bool:
    routed = [name for name in tiny_types() if "moe" in name or name in ("mixtral", "gpt_oss", "deepseek_v3")]
    return bool(routed) and all(any("experts" in n for n, _ in tiny_model(name).named_modules()) for name in routed)


@internal("transformers", "CONFIG_MAPPING and AutoConfig.for_model", "models", "to make tiny models by their type")
def _configs_by_type() -> bool:
    config = transformers.AutoConfig.for_model("llama", **TINY)
    return "llama" in transformers.CONFIG_MAPPING and config.hidden_size == TINY["hidden_size"]


@internal("transformers", "Trainer.current_gradient_accumulation_steps", "trl", "to weigh micro-batches by their pairs")
def _trainer_counts_micro_batches() -> bool:
    methods = filter(inspect.isfunction, vars(transformers.Trainer).values())
    return any("current_gradient_accumulation_steps" in method.__code__.co_names for method in methods)


@internal(
    "transformers", "Trainer.get_batch_samples(epoch_iterator, num_batches, device)", "trl",
    "to count a step's pairs", "transformers.Trainer.get_batch_samples",
)  # fmt: skip
def _trainer_gets_batches() -> bool:
    names = list(inspect.signature(transformers.Trainer.get_batch_samples).parameters)
    return names == ["self", "epoch_iterator", "num_batches", "device"]


@internal(
    "transformers", "TrainerCallback.on_log and TrainerState.log_history", "callbacks", "to add savings to a log entry",
    "transformers.TrainerCallback.on_log",
)  # fmt: skip
def _callbacks_see_logs() -> bool:
    return callable(transformers.TrainerCallback.on_log) and transformers.TrainerState().log_history == []


# --- peft, TRL, accelerate --------------------------------------------------------------------------------------------


def lora(**settings: Any) -> peft.PeftModel:
    return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], **settings))


@internal(
    "peft", "names of wrapped weights: prefix, .base_layer., .original_module., .modules_to_save.", "patch",
    "to find a model's own weights among its adapters'", "peft.tuners.lora.LoraModel.prefix",
)  # fmt: skip
def _wrapped_weights_are_named() -> bool:
    model = lora(modules_to_save=["lm_head"])
    names = list(model.get_base_model().state_dict())
    ours = [name for name in names if model.base_model.prefix in name or ".modules_to_save." in name]
    rest = {name.replace(".base_layer.", ".").replace(".original_module.", ".") for name in set(names) - set(ours)}
    return bool(ours) and rest == set(tiny_model("llama").state_dict())


@internal(
    "peft", "lora_variant, of LoRA layers, with ALora* classes", "refusals", "to refuse adapters that look for tokens",
    "peft.tuners.lora.variants.ALoraLinearVariant",
)  # fmt: skip
def _variants_are_named() -> bool:
    importlib.import_module("peft.tuners.lora.variants").ALoraLinearVariant  # noqa: B018
    layer = lora(alora_invocation_tokens=[5]).get_base_model().model.layers[0].self_attn.q_proj
    return type(vars(layer)["lora_variant"]["default"]).__name__.startswith("ALora")


@internal(
    "peft", "peft_config or _peft_config, with is_prompt_learning and alora_invocation_tokens", "refusals",
    "to refuse adapters that add tokens", "peft.PromptLearningConfig.is_prompt_learning",
)  # fmt: skip
def _settings_say_what_adapters_do() -> bool:
    """Among the own attributes of the model or of a module in it."""
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    found = []
    for model in (peft.get_peft_model(tiny_model("llama"), prompts), lora(alora_invocation_tokens=[5])):
        tables = [vars(m).get("peft_config") or vars(m).get("_peft_config") or {} for m in model.modules()]
        settings = next(settings for table in tables for settings in table.values())
        found.append((settings.is_prompt_learning, getattr(settings, "alora_invocation_tokens", None)))
    return found == [(True, None), (False, [5])]


@internal("peft", "peft.tuners and the name of a PeftType, where its layers are", "tuners", "to tell tuners by layers")
def _layers_are_in_packages_of_their_tuners() -> bool:
    found = [config.__module__.split(".") for config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()]
    return {path[2].upper() for path in found if path[:2] == ["peft", "tuners"]} >= REFUSED.keys() - {
        "SHADOW"
    }  # newer than some supported peft


@internal(
    "peft", "PeftModel.disable_adapter", "reference", "to run a reference on the base weights",
    "peft.PeftModel.disable_adapter",
)  # fmt: skip
def _adapters_can_be_off() -> bool:
    model, ids = lora(init_lora_weights=False), torch.tensor([[3, 4, 5]])
    with torch.no_grad(), model.disable_adapter():
        off = model(ids).logits
    with torch.no_grad():
        return torch.equal(off, tiny_model("llama")(ids).logits) and not torch.equal(off, model(ids).logits)


@internal(
    "bitsandbytes", "Linear8bitLt, with its threshold in state", "quantized_layers", "to refuse outliers of LLM.int8",
    "bitsandbytes.nn.Linear8bitLt",
)  # fmt: skip
def _int8_layers_have_a_threshold() -> bool:
    layer = importlib.import_module("bitsandbytes").nn.Linear8bitLt(4, 4, threshold=6.0)
    return type(layer).__name__ == "Linear8bitLt" and vars(layer)["state"].threshold == 6.0


@internal("trl", "DataCollatorForPreference: chosen rows first, then rejected", "trl", "to count a batch's pairs")
def _collator_puts_chosen_first() -> bool:
    trainer = importlib.import_module("trl.trainer.dpo_trainer")
    pairs = [{"prompt_ids": [7, p], "chosen_ids": [1], "rejected_ids": [2, 2]} for p in (8, 9)]
    batch = trainer.DataCollatorForPreference(pad_token_id=0)(pairs)
    return bool(batch["input_ids"].tolist() == [[7, 8, 1, 0], [7, 9, 1, 0], [7, 8, 2, 2], [7, 9, 2, 2]])


@internal(
    "trl", "DPOTrainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)", "trl",
    "to weigh micro-batches by their pairs",
)  # fmt: skip
def _loss_knows_the_step() -> bool:
    names = list(inspect.signature(importlib.import_module("trl").DPOTrainer.compute_loss).parameters)
    return names == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


@internal(
    "trl", "DPOConfig: loss_type, max_length, truncation_mode, data_seed", "trl", "to know lengths as they will be cut"
)
def _settings_of_training_have_names() -> bool:
    known = {
        field.name for field in importlib.import_module("dataclasses").fields(importlib.import_module("trl").DPOConfig)
    }
    return {"loss_type", "max_length", "truncation_mode", "data_seed", "seed"} <= known


@internal("accelerate", "hf_device_map, of dispatched models", "patch", "to refuse models on several devices")
def _dispatched_models_say_so() -> bool:
    model = accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    return bool(model.hf_device_map == {"": "cpu"})


@internal(
    "accelerate", "prepared loaders: ranks take batches in turn and pass set_epoch on to the sampler", "trl",
    "to run the bins of a step together, and others every epoch", "accelerate.data_loader.BatchSamplerShard",
)  # fmt: skip
def _ranks_take_turns() -> bool:
    importlib.import_module("accelerate.data_loader").BatchSamplerShard  # noqa: B018
    sampler = Bins()
    loader = DataLoader(list(range(6)), batch_size=1, sampler=sampler)
    prepare = importlib.import_module("accelerate.data_loader").prepare_data_loader
    ranks = [prepare(loader, num_processes=2, process_index=rank, put_on_device=False) for rank in (0, 1)]
    ranks[0].set_epoch(3)
    told = sampler.epoch == 3
    return told and [[int(x) for x in rank] for rank in ranks] == [[0, 2, 4], [1, 3, 5]]


class Bins(torch.utils.data.Sampler[int]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


# --- torch ------------------------------------------------------------------------------------------------------------


HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


@internal("torch", ", ".join(HOOKS), "patch", "to find its hooks in copied models, and take them off")
def _modules_keep_hooks_in_tables() -> bool:
    module = nn.Linear(1, 1)
    before = module.register_forward_pre_hook(print, with_kwargs=True)
    after = module.register_forward_hook(print, with_kwargs=True, prepend=True, always_call=True)
    return [list(getattr(module, name)) for name in HOOKS] == [[before.id]] * 2 + [[after.id]] * 3


@internal("torch", "_modules, of a module's own attributes", "refusals", "to walk a model fast before every call")
def _modules_keep_their_children() -> bool:
    child = nn.Linear(1, 1)
    return list(vars(nn.Sequential(child))["_modules"].values()) == [child]


@internal(
    "torch", "_modules, _forward_pre_hooks, _forward_hooks, of a module's own attributes", "parallelism",
    "to find hooks that drop masks",
)  # fmt: skip
@internal(
    "torch", "_modules, _forward_pre_hooks, _forward_hooks, in a module's own attributes", "refusals",
    "to walk all modules before a call",
)  # fmt: skip
@internal(
    "torch", "_modules, _parameters, in a module's own attributes; _local_tensor of a DTensor", "quantized_layers",
    "to look at a layer's weights before a call",
)  # fmt: skip
@internal(
    "torch", "_forward_pre_hooks, _forward_hooks, in a module's own attributes", "tuners",
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


@internal(
    "torch", "DTensor._op_dispatcher._custom_op_handlers", "parallelism", "to see that context parallelism is enabled"
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


@internal("torch", "_functorch.is_functorch_wrapped_tensor", "patch", "to leave ids alone that vmap holds")
def _vmap_wraps_tensors() -> bool:
    seen: list[bool] = []
    ids = torch.arange(4)
    wraps = torch._C._functorch.is_functorch_wrapped_tensor
    torch.func.vmap(lambda x: seen.append(wraps(x)) or x)(ids)
    return seen == [True] and not wraps(ids)


@internal(
    "peft", "_peft_config of a tuner's settings, _niter_ of LoRA's starts, the file _buffer_dict", "tuners",
    "to know tuners, and what they share, by name",
)  # fmt: skip
def _tuners_are_known_by_name() -> bool:
    import peft.tuners._buffer_dict

    model = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    return "_niter_" in inspect.getsource(peft.LoraConfig) and list(vars(model)["_peft_config"]) == ["default"]


@internal("accelerate", "AcceleratorState._shared_state", "parallelism", "to see what sizes accelerate was given")
def _accelerator_state_is_shared() -> bool:
    return isinstance(AcceleratorState._shared_state, dict)


@internal(
    "torch", "is_in_torch_dispatch_mode", "patch", "to fold a watched batch anew, as selective checkpointing expects"
)
def _modes_can_be_seen() -> bool:
    with TorchDispatchMode():
        inside = is_in_torch_dispatch_mode()
    return inside and not is_in_torch_dispatch_mode()


@internal("torch", "torch._dynamo.config.recompile_limit", "attention", "to compile attention for every length")
def _recompiles_have_limits() -> bool:
    from torch._dynamo import config

    return isinstance(config.recompile_limit, int) and isinstance(config.accumulated_recompile_limit, int)


@internal("torch", "torch._dynamo.exc.TorchDynamoException", "compiled", "to say why layers do not compile")
def _errors_of_compiling_have_a_base() -> bool:
    from torch._dynamo import exc

    return issubclass(exc.Unsupported, exc.TorchDynamoException)


@internal(
    "torch", "BlockMask's tables and seq_lengths", "masks", "to make block masks in O(L)",
    "torch.nn.attention.flex_attention.BlockMask",
)  # fmt: skip
def _block_masks_are_tables() -> bool:
    tables = {f"{kind}_{of}" for kind in ("kv", "full_kv", "q", "full_q") for of in ("num_blocks", "indices")}
    return {"seq_lengths", "BLOCK_SIZE", "mask_mod", *tables} <= set(
        inspect.signature(flex_attention.BlockMask).parameters
    )


@internal(
    "torch", "flex_attention's options, and AuxRequest(lse=True)", "attention", "for soft caps, sinks and shared heads",
    "torch.nn.attention.flex_attention.AuxRequest",
)  # fmt: skip
def _flex_has_options() -> bool:
    options = {"score_mod", "block_mask", "scale", "enable_gqa", "kernel_options", "return_aux"}
    return bool(flex_attention.AuxRequest(lse=True).lse) and options <= set(
        inspect.signature(flex_attention.flex_attention).parameters
    )


@internal("torch", "segment_reduce", "logprobs", "to sum answers in a fixed order", "torch.segment_reduce")
def _sums_of_segments() -> bool:
    sums = torch.segment_reduce(torch.arange(5.0), "sum", lengths=torch.tensor([2, 3]), unsafe=True)
    return sums.tolist() == [1.0, 9.0]


# --- the tests --------------------------------------------------------------------------------------------------------


def names(entries: list[Internal]) -> list[str]:
    return [f"{entry.package}: {entry.name}" for entry in entries]


@pytest.mark.parametrize("entry", INTERNALS, ids=names(INTERNALS))
def test_what_flexpatch_relies_on(entry: Internal) -> None:
    entry.check()


REMOVABLE = [entry for entry in INTERNALS if entry.gone]


@pytest.mark.parametrize("entry", REMOVABLE, ids=names(REMOVABLE))
def test_a_missing_internal_is_named(entry: Internal, monkeypatch: pytest.MonkeyPatch) -> None:
    """With package and version, and the file that needs it."""
    entry.skip_old()
    monkeypatch.delattr(entry.gone)
    version = metadata.version(entry.package)
    with pytest.raises(pytest.fail.Exception) as failure:
        entry.check()
    message = str(failure.value)
    assert message.startswith(f"{entry.package} {version}: {entry.name} is gone or changed"), message
    assert message.endswith(f"flexpatch/{entry.file}.py relies on it {entry.why}"), message


def test_a_changed_internal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in its place that behaves otherwise."""
    of = {entry.name: entry for entry in INTERNALS}
    changed: dict[str, tuple[Any, str, Any]] = {
        "config.get_text_config": (transformers.PreTrainedConfig, "get_text_config", lambda self: None),
        "PreTrainedModel.base_model": (transformers.PreTrainedModel, "base_model", property(lambda self: self)),
        "get_output_embeddings": (transformers.LlamaForCausalLM, "get_output_embeddings", lambda self: None),
        "is_in_torch_dispatch_mode": (importlib.import_module(__name__), "is_in_torch_dispatch_mode", lambda: False),
    }
    for name, (owner, attribute, other) in changed.items():
        of[name].check()
        with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match=re.escape(name)):
            patch.setattr(owner, attribute, other)
            of[name].check()


class Recorder:
    """A configuration that notes what is asked of it."""

    def __init__(self, config: Any, asked: set[str]) -> None:
        self._given = config, asked

    def __getattr__(self, name: str) -> Any:
        config, asked = self._given
        asked.add(name)
        return getattr(config, name)


@pytest.mark.parametrize("adapter", dict.fromkeys(adapters().values()), ids=lambda adapter: adapter.name)
def test_configurations_have_what_adapters_read(adapter: Any) -> None:
    """A renamed setting would be read as its default, in silence: a window as none."""
    if unknown := set(adapter.tiny) - set(tiny_types()):
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(sorted(unknown))}")
    asked: set[str] = set()
    configs = [
        text_config(tiny_model(model_type, variant))
        for model_type, variants in adapter.tiny.items()
        for variant in range(len(variants))
    ]
    for config in configs:
        for rule in (adapter.windows, adapter.head, adapter.reject):
            rule(Recorder(config, asked))
    for name in sorted(asked):
        assert any(hasattr(config, name) for config in configs), (
            f"transformers {transformers.__version__}: configurations of {', '.join(adapter.tiny)} lack '{name}'. "
            f"The adapter {adapter.name} in adapters/ reads it for windows, logits or refusals"
        )


# Private names of other packages, file by file. patch.py is where they belong; why the others have some:
PRIVATE = {
    "patch": {
        "_attn_implementation", "_can_set_experts_implementation", "_forward_hooks", "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_functorch",
    },
    # One walk over all modules before every call: it reads their attributes, and imports nothing.
    "refusals": {"_forward_hooks", "_forward_pre_hooks", "_gradient_checkpointing_func", "_modules"},
    "tuners": {"_buffer_dict", "_forward_hooks", "_forward_pre_hooks", "_niter_", "_peft_config"},
    # Of the same walk; and names of functions that older torchao keeps beside a weight.
    "quantized_layers": {
        "_input_quantizer", "_int8_asymm_per_token_quant", "_int8_symm_per_token_quant",
        "_int8_symm_per_token_reduced_range_quant", "_local_tensor", "_modules", "_output_quantizer", "_parameters",
    },
    # What others have switched on, read with fallbacks where torch and accelerate have no public way to ask.
    "parallelism": {
        "_custom_op_handlers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_op_dispatcher", "_shared_state",
    },
    # Torch's compiler, not Hugging Face's.
    "attention": {"_dynamo"},
    "compiled": {"_dynamo"},
    # Of a named tuple: public.
    "estimate": {"_asdict"},
}  # fmt: skip
# Names that quantizers' own objects are compared with: an object of another name is refused, so none is relied on.
COMPARED = {
    "_input_quantizer", "_int8_asymm_per_token_quant", "_int8_symm_per_token_quant",
    "_int8_symm_per_token_reduced_range_quant", "_output_quantizer",
}  # fmt: skip
# Names that are flexpatch's own: keys and suffixes.
OWN = {"_attention", "_device", "_ids", "_num_blocks", "_indices"}
# What files import of transformers, or use as its attributes. Only patch.py may go below the top level.
PUBLIC = {
    "callbacks": {"TrainerCallback"},
    "models": {
        "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "CONFIG_MAPPING", "GgufConfig", "PreTrainedModel",
        "__version__",
    },
    "parity": {"__version__"},
    "verify": {"utils"},
}  # fmt: skip
BELOW = {
    "patch": {"transformers.masking_utils", "transformers.modeling_layers", "transformers.modeling_utils"},
    "models": {"transformers.utils"},  # where models' files are, hub or not
}


def private_names(source: ast.AST) -> set[str]:
    """Names with one leading underscore read from anything but ``self``, as attributes or as strings."""
    own = {node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return {name for name in found if re.fullmatch(r"_[a-z]\w*", name)} - own - OWN


def of_transformers(source: ast.AST) -> tuple[set[str], set[str]]:
    """Names of its top level that a file uses, and modules below it that it imports from."""
    top, below = set(), set()
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            if node.module == "transformers":
                top |= {name.name for name in node.names}
            else:
                below.add(str(node.module))
        elif isinstance(node, ast.Import):
            below |= {name.name for name in node.names if name.name.startswith("transformers.")}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "transformers":
            top.add(node.attr)
    return top, below


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_one_file_touches_internals(file: Path) -> None:
    source = ast.parse(file.read_text(encoding="utf-8"))
    new = private_names(source) - PRIVATE.get(file.stem, set())
    assert not new, f"{file.name} reads {', '.join(sorted(new))}: private names belong in patch.py, with an entry here"
    top, below = of_transformers(source)
    new = below - BELOW.get(file.stem, set())
    assert not new, f"{file.name} imports {', '.join(sorted(new))}: internals of transformers belong in patch.py"
    if file.stem != "patch":
        new = top - PUBLIC.get(file.stem, set())
        assert not new, f"{file.name} uses {', '.join(sorted(new))} of transformers: list it here"


def test_the_lists_are_no_longer_than_needed_and_each_name_is_tested() -> None:
    sources = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    for name, listed in PRIVATE.items():
        assert listed == private_names(sources[name]), name
        tested = {word for entry in INTERNALS if entry.file == name for word in re.findall(r"\w+", entry.name)}
        assert listed - {"_asdict"} - COMPARED <= tested, f"{name}: {listed - tested - COMPARED} have no entry"
    for name, listed in PUBLIC.items():
        assert listed == of_transformers(sources[name])[0], name
    for name, listed in BELOW.items():
        assert listed == of_transformers(sources[name])[1], name


@pytest.mark.parametrize(
    ("code", "private", "used"),
    [
        ("model._tied_weights_keys", {"_tied_weights_keys"}, (set(), set())),
        ("getattr(module, '_gradient_checkpointing_func')", {"_gradient_checkpointing_func"}, (set(), set())),
        ("self._layers", set(), (set(), set())),
        ("from transformers.cache_utils import Cache", set(), (set(), {"transformers.cache_utils"})),
        ("import transformers.cache_utils", set(), (set(), {"transformers.cache_utils"})),
        ("from transformers import Cache", set(), ({"Cache"}, set())),
        ("transformers.Cache()", set(), ({"Cache"}, set())),
    ],
)
def test_touches_are_noticed(code: str, private: set[str], used: tuple[set[str], set[str]]) -> None:
    assert (private_names(ast.parse(code)), of_transformers(ast.parse(code))) == (private, used)


def test_the_message() -> None:
    """Read it once as a maintainer would."""
    entry = INTERNALS[0]._replace(holds=lambda: transformers.gone)
    with pytest.raises(pytest.fail.Exception) as failure:
        entry.check()
    assert str(failure.value) == (
        f"transformers {transformers.__version__}: PreTrainedModel.set_attn_implementation is gone or changed "
        "(AttributeError: module transformers has no attribute gone). flexpatch/patch.py relies on it to put its "
        "attention into every layer"
    )
