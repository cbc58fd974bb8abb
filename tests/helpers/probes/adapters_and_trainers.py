"""Facts about peft, bitsandbytes, TRL and accelerate."""

import importlib
import inspect
from typing import Any

import accelerate
import peft
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from flexpatch.models import tiny_model
from flexpatch.tuners import REFUSED
from helpers.probes.table import probe


def lora(**settings: Any) -> peft.PeftModel:
    return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], **settings))


@probe(
    "peft", "names of wrapped weights: prefix, .base_layer., .original_module., .modules_to_save.",
    "internals.base_weights",
    "to find a model's own weights among its adapters'", "peft.tuners.lora.LoraModel.prefix",
)  # fmt: skip
def _wrapped_weights_are_named() -> bool:
    model = lora(modules_to_save=["lm_head"])
    names = list(model.get_base_model().state_dict())
    ours = [name for name in names if model.base_model.prefix in name or ".modules_to_save." in name]
    rest = {name.replace(".base_layer.", ".").replace(".original_module.", ".") for name in set(names) - set(ours)}
    return bool(ours) and rest == set(tiny_model("llama").state_dict())


@probe(
    "peft", "lora_variant, of LoRA layers, with ALora* classes",
    "tuners._layer_refusal", "to refuse adapters that look for tokens",
    "peft.tuners.lora.variants.ALoraLinearVariant",
)  # fmt: skip
def _variants_are_named() -> bool:
    importlib.import_module("peft.tuners.lora.variants").ALoraLinearVariant  # noqa: B018
    layer = lora(alora_invocation_tokens=[5]).get_base_model().model.layers[0].self_attn.q_proj
    return type(vars(layer)["lora_variant"]["default"]).__name__.startswith("ALora")


@probe(
    "peft", "peft_config or _peft_config, with is_prompt_learning and alora_invocation_tokens", "tuners.refusal",
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


@probe(
    "peft", "peft.tuners and the name of a PeftType, where its layers are", "tuners._judge", "to tell tuners by layers"
)
def _layers_are_in_packages_of_their_tuners() -> bool:
    found = [config.__module__.split(".") for config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()]
    newer = {"CARTRIDGE", "LILY", "PVERA", "SHADOW"}  # than peft 0.18
    return {path[2].upper() for path in found if path[:2] == ["peft", "tuners"]} >= REFUSED.keys() - newer


@probe(
    "peft", "PeftModel.disable_adapter", "reference.reference_logprobs", "to run a reference on the base weights",
    "peft.PeftModel.disable_adapter",
)  # fmt: skip
def _adapters_can_be_off() -> bool:
    model, ids = lora(init_lora_weights=False), torch.tensor([[3, 4, 5]])
    with torch.no_grad(), model.disable_adapter():
        off = model(ids).logits
    with torch.no_grad():
        return torch.equal(off, tiny_model("llama")(ids).logits) and not torch.equal(off, model(ids).logits)


@probe(
    "bitsandbytes", "Linear8bitLt, with its threshold in state",
    "quantized_layers._outliers", "to refuse outliers of LLM.int8", "bitsandbytes.nn.Linear8bitLt",
)  # fmt: skip
def _int8_layers_have_a_threshold() -> bool:
    layer = importlib.import_module("bitsandbytes").nn.Linear8bitLt(4, 4, threshold=6.0)
    return type(layer).__name__ == "Linear8bitLt" and vars(layer)["state"].threshold == 6.0


@probe(
    "trl",
    "DataCollatorForPreference: chosen rows first, then rejected",
    "trl.PackedDPOTrainer.samples",
    "to count a batch's pairs",
)
def _collator_puts_chosen_first() -> bool:
    trainer = importlib.import_module("trl.trainer.dpo_trainer")
    pairs = [{"prompt_ids": [7, p], "chosen_ids": [1], "rejected_ids": [2, 2]} for p in (8, 9)]
    batch = trainer.DataCollatorForPreference(pad_token_id=0)(pairs)
    return bool(batch["input_ids"].tolist() == [[7, 8, 1, 0], [7, 9, 1, 0], [7, 8, 2, 2], [7, 9, 2, 2]])


@probe(
    "trl", "DPOTrainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)",
    "trl.PackedDPOTrainer.compute_loss", "to weigh micro-batches by their pairs",
)  # fmt: skip
def _loss_knows_the_step() -> bool:
    names = list(inspect.signature(importlib.import_module("trl").DPOTrainer.compute_loss).parameters)
    return names == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


@probe(
    "trl", "_buffered_inputs and _step, of GRPOTrainer and RLOOTrainer",
    "trl.WholeGroups._prepare_inputs", "to keep groups together",
)  # fmt: skip
def _generated_batches_are_kept() -> bool:
    trl = importlib.import_module("trl")
    methods = [inspect.unwrap(getattr(trl, name)._prepare_inputs) for name in ("GRPOTrainer", "RLOOTrainer")]
    return all({"_buffered_inputs", "_step", "steps_per_generation"} <= set(m.__code__.co_names) for m in methods)


@probe(
    "trl", "KL_completion_ids: a column that KTOTrainer's collator reads",
    "trl.PackedKTOTrainer.collate_bin", "to rotate completions within a bin",
)  # fmt: skip
def _rotated_completions_are_a_column() -> bool:
    collator = importlib.import_module("trl.trainer.kto_trainer").DataCollatorForUnpairedPreference(pad_token_id=0)
    batch = collator([dict(prompt_ids=[5], completion_ids=[6], KL_completion_ids=[7, 8], label=True)])
    return bool(batch["KL_input_ids"].tolist() == [[5, 7, 8]] and batch["input_ids"].tolist() == [[5, 6]])


@probe(
    "trl",
    "DPOConfig: loss_type, max_length, truncation_mode, data_seed",
    "trl.PackedDPOTrainer",
    "to know lengths as they will be cut",
)
def _settings_of_training_have_names() -> bool:
    known = {
        field.name for field in importlib.import_module("dataclasses").fields(importlib.import_module("trl").DPOConfig)
    }
    return {"loss_type", "max_length", "truncation_mode", "data_seed", "seed"} <= known


@probe(
    "accelerate", "hf_device_map, of dispatched models", "dispatch.check_backend", "to refuse models on several devices"
)
def _dispatched_models_say_so() -> bool:
    model = accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    return bool(model.hf_device_map == {"": "cpu"})


@probe(
    "accelerate", "prepared loaders: ranks take batches in turn and pass set_epoch on to the sampler", "trl.BinSampler",
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


@probe(
    "peft", "_peft_config of a tuner's settings, _niter_ of LoRA's starts, the file _buffer_dict", "tuners._judge",
    "to know tuners, and what they share, by name",
)  # fmt: skip
def _tuners_are_known_by_name() -> bool:
    import peft.tuners._buffer_dict

    model = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    return "_niter_" in inspect.getsource(peft.LoraConfig) and list(vars(model)["_peft_config"]) == ["default"]


@probe(
    "accelerate", "AcceleratorState._shared_state", "parallelism._accelerate", "to see what sizes accelerate was given"
)
def _accelerator_state_is_shared() -> bool:
    return isinstance(AcceleratorState._shared_state, dict)
