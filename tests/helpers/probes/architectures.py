"""Facts about transformers' modeling code, checked for every architecture."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from flexpatch.internals import decoder_of, layers_of, text_config
from flexpatch.masks import block_mask
from flexpatch.models import tiny_model
from flexpatch.registry import FULL, SLIDING, adapters
from flexpatch.rows import build_rows
from flexpatch.tree import Tree
from helpers.oracle import random_ids
from helpers.probes.table import each, probe

NAME = "test_upgrades_probe"
Call = dict[str, Any]


@contextmanager
def listening(model_type: str) -> Iterator[tuple[PreTrainedModel, list[Call]]]:
    """A model whose attention function keeps the arguments of its calls and returns what the model can go on with."""
    calls: list[Call] = []

    def listen(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        calls.append(dict(module=module, q=q, k=k, v=v, mask=attention_mask, **others))
        return q.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, listen)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model = tiny_model(model_type)
        decoder_of(model).set_attn_implementation(NAME)
        yield model, calls
    finally:
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            type(table)._global_mapping.pop(NAME)


def ids(length: int = 12) -> Tensor:
    return torch.tensor(random_ids(length))


def text_layers(model: PreTrainedModel) -> Any:
    return decoder_of(model.base_model).layers


def attention_of(layer: nn.Module) -> nn.Module:
    return layer.attention if isinstance(layer, GPTNeoXLayer) else layer.self_attn


def row_mask() -> Any:
    rows = build_rows([[Tree.of(*random_ids(6, 3, 3))]])
    return block_mask(rows.ends, rows.position_ids, None)


def bool_mask() -> Tensor:
    return torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()


def additive_mask() -> Tensor:
    return torch.zeros(1, 1, 12, 12, dtype=torch.float64)


def by_layer(model: PreTrainedModel, make: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """The argument ``attention_mask`` as an adapter makes it, and the mask that each layer must get."""
    if adapters()[model.config.model_type].masks == "single":
        mask = make()
        return mask, [mask] * len(text_layers(model))
    masks = {layer: make() for layer in (FULL, SLIDING)}
    return masks, [masks[layer] for layer in text_config(model).layer_types]


# --- Attention --------------------------------------------------------------------------------------------------------


@each("eager_attention_forward, in the model's file", "dispatch._eager_of", "to run ordinary calls of eager models")
def _eager_attention_is_a_function_of_the_file(model_type: str) -> bool:
    attention = type(attention_of(text_layers(tiny_model(model_type))[0]))
    return callable(vars(sys.modules[attention.__module__]).get("eager_attention_forward"))


@each("an attention implementation of a custom name", "internals.set_attention", "to be called in every layer")
def _a_model_takes_a_registered_name(model_type: str) -> bool:
    with listening(model_type) as (model, calls):
        named = text_config(model)._attn_implementation == NAME
        model(input_ids=ids())
        called = [call["module"] for call in calls] == [attention_of(layer) for layer in text_layers(model)]
        model.set_attn_implementation("eager")  # as ``remove`` does
        return named and called and text_config(model)._attn_implementation == "eager"


@each(
    "queries, keys and values as (batch, heads, tokens, size), keys and values unrepeated", "attention.flex",
    "to compute attention",
)  # fmt: skip
def _shapes_of_attention(model_type: str) -> bool:
    with listening(model_type) as (model, calls):
        model(input_ids=ids())
    config, call = text_config(model), calls[0]
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, call["q"].shape[-1]
    shapes = [tuple(call[x].shape[: 4 if x != "v" else 3]) for x in "qkv"]  # DeepSeek's values have another size
    return shapes == [(1, heads, 12, size), (1, groups, 12, size), (1, groups, 12)]


@each("scaling and dropout, keyword arguments of attention functions", "attention.flex", "to compute attention")
def _options_of_attention(model_type: str) -> bool:
    with listening(model_type) as (model, calls):
        model(input_ids=ids())
    return {"scaling", "dropout"} <= calls[0].keys()


@each("softcap, an argument of attention functions", "attention.flex", "to cap Gemma 2's scores", of=["gemma2"])
def _soft_cap_of_attention(model_type: str) -> bool:
    with listening(model_type) as (model, calls):
        model(input_ids=ids())
    return calls[0]["softcap"] == text_config(model).attn_logit_softcapping


@each("s_aux, an argument of attention functions", "attention.flex", "to add gpt-oss's sinks", of=["gpt_oss"])
def _sinks_of_attention(model_type: str) -> bool:
    with listening(model_type) as (model, calls):
        model(input_ids=ids())
    return calls[0]["s_aux"].shape == (text_config(model).num_attention_heads,)


def _ready_masks_pass(make: Callable[[], Any], model_type: str) -> None:
    """The object itself, one for all layers or one for each type of layer; also with the cache left on."""
    with listening(model_type) as (model, calls):
        given, expected = by_layer(model, make)
        for use_cache in (False, True):
            calls.clear()
            # Gemma 4 slices its masks otherwise.
            model(input_ids=ids(), attention_mask=given, use_cache=use_cache, logits_to_keep=torch.tensor([0]))
            passed = all(call["mask"] is mask for call, mask in zip(calls, expected, strict=True))
            assert passed, f"use_cache={use_cache}"


for _kind, _make in {"BlockMask": row_mask, "bool": bool_mask, "additive": additive_mask}.items():
    each(
        f"a ready {_kind} mask, or a dict of them by layer type, that reaches attention functions untouched",
        "row_calls.row_inputs", "to say what the tokens of a row see",
    )(functools.partial(_ready_masks_pass, _make))  # fmt: skip


@each("position_ids, which reach rope", "row_calls.row_inputs", "so that answers start where their prompt ends")
def _positions_reach_rope(model_type: str) -> None:
    """Two tokens that are alike have the same query exactly if their position ids are the same."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]])
    with listening(model_type) as (model, calls):
        mask, _ = by_layer(model, bool_mask)
        model(input_ids=torch.full((1, 12), 5), position_ids=positions, attention_mask=mask, use_cache=False)
    q = calls[0]["q"][0].transpose(0, 1)
    assert torch.equal(q[4:8], q[8:12]), "queries depend on more than token and position_ids"
    assert not torch.equal(q[4], q[5]), "position_ids do not reach rope"
    assert not torch.equal(q[8], q[7]), "position_ids do not reach rope"


@each("other arguments of a call, which reach attention functions", "dispatch._attention", "to know a hook's calls")
def _other_arguments_reach_attention(model_type: str) -> bool:
    with listening(model_type) as (model, calls):
        model(ids(), some_argument=True)
    return bool(calls) and all(call.get("some_argument") is True for call in calls)


# --- Backbones and layers ---------------------------------------------------------------------------------------------


@each("logits_to_keep, which takes columns", "scoring.run_rows", "to make no logits that nobody reads")
def _logits_to_keep_takes_columns(model_type: str) -> bool:
    model, keep = tiny_model(model_type), torch.tensor([0, 3, 4, 11])
    with torch.no_grad():
        whole = model(input_ids=ids()).logits
        some = model(input_ids=ids(), logits_to_keep=keep).logits
    shape = (1, 4, text_config(model).vocab_size)
    return some.shape == shape and torch.allclose(some, whole[:, keep], rtol=0, atol=1e-12)


@each("rope_parameters and layer_types, of configurations", "registry.adapter_for", "to know windows and ropes")
def _configurations_say_what_adapters_read(model_type: str) -> None:
    config = text_config(tiny_model(model_type))
    assert config.get_text_config() is config, "a text model's get_text_config() is not itself"
    assert isinstance(config.rope_parameters, dict), "rope settings are kept elsewhere"
    if adapters()[model_type].masks == "by_layer_type":
        assert set(config.layer_types) <= {FULL, SLIDING}, "there are new layer types"
    else:
        assert not getattr(config, "layer_types", None), "there are layer types now; it may take a dict of masks"


@each(
    "a base_model that is called once, as a module, with the caller's own arguments", "forward.register_hooks",
    "to fold a batch in one hook and to change its hidden states in another",
)  # fmt: skip
def _a_backbone_is_all_that_counts(model_type: str) -> None:
    model, calls = tiny_model(model_type), []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(zip(("input_ids",), args, strict=False)) | kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flip(0)
        return output

    batch = torch.cat([ids(), ids().flip(1)])
    expected = model(batch, use_cache=False).logits.flip(0)
    model.base_model.register_forward_pre_hook(before, with_kwargs=True)
    model.base_model.register_forward_hook(after, with_kwargs=True)
    assert torch.equal(model(batch, use_cache=False).logits, expected), "logits need more than hidden states"
    assert len(calls) == 1, f"base_model is called {len(calls)} times"
    assert calls[0]["input_ids"] is batch and calls[0]["use_cache"] is False, "its arguments are not the caller's"


@each("hidden_states of the backbone, which leave the model", "scoring.run_rows", "to carry log-probs out")
def _hidden_states_leave_the_model(model_type: str) -> None:
    model, marker = tiny_model(model_type), torch.zeros(3)

    def mark(module: nn.Module, args: Any, output: Any) -> Any:
        output.hidden_states = (marker,)
        return output

    model.base_model.register_forward_hook(mark)
    output = model(ids(), use_cache=False, logits_to_keep=torch.empty(0, dtype=torch.int64))
    assert output.hidden_states[0] is marker, "they are not passed on"
    assert output.logits.shape[1] == 0, "logits of positions that were not asked for are computed"


@each("decoder layers in a list, each with a flag of its own", "internals.layers_of", "to choose what is recomputed")
def _layers_are_in_a_list(model_type: str) -> bool:
    model = tiny_model(model_type)
    layers = layers_of(model.base_model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return len(layers) == text_config(model).num_hidden_layers and all(x.gradient_checkpointing for x in layers)


@each("config.get_text_config(), which text layers hold", "internals.set_attention", "to set attention in all of them")
def _layers_hold_the_text_configuration(model_type: str) -> bool:
    model = tiny_model(model_type)
    return all(attention_of(layer).config is model.config.get_text_config() for layer in text_layers(model))


@each("attention_dropout, of attention modules", "refusals.check_mode", "to refuse active dropout")
def _attention_keeps_its_dropout(model_type: str) -> bool:
    layers = layers_of(tiny_model(model_type).base_model)
    return len(layers) > 0 and all(any("attention_dropout" in vars(m) for m in layer.modules()) for layer in layers)


# --- Registries -------------------------------------------------------------------------------------------------------


@probe("transformers", "ALL_ATTENTION_FUNCTIONS['sdpa']", "dispatch._attention", "to run ordinary calls")
def _attention_has_an_original() -> bool:
    return "sdpa" in ALL_ATTENTION_FUNCTIONS


@probe(
    "transformers", "ALL_MASK_ATTENTION_FUNCTIONS['sdpa'] and ['eager']", "dispatch.register_name",
    "so that ordinary calls keep their padding",
)  # fmt: skip
def _masks_have_originals() -> bool:
    return all(original in ALL_MASK_ATTENTION_FUNCTIONS for original in ("sdpa", "eager"))


GENERAL = "transformers.modeling_utils.GeneralInterface.register"


@probe("transformers", "AttentionInterface.register", "dispatch.register_name", "to make its attention known", GENERAL)
def _registers_attention() -> bool:
    return _registers(AttentionInterface, ALL_ATTENTION_FUNCTIONS)


@probe("transformers", "AttentionMaskInterface.register", "dispatch.register_name", "so that calls keep masks", GENERAL)
def _registers_masks() -> bool:
    return _registers(AttentionMaskInterface, ALL_MASK_ATTENTION_FUNCTIONS)


def _registers(interface: Any, table: Any) -> bool:
    interface.register(NAME, _registers)
    try:
        return NAME in table and table[NAME] is _registers
    finally:
        type(table)._global_mapping.pop(NAME)
