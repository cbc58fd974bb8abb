"""What flexpatch relies on in transformers, one test each, for every architecture.

When a new release breaks other tests, start here and in test_upgrades.py: these say which promise is gone, and all of
flexpatch's dealings with it are in ``flexpatch/patch.py``.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from helpers.oracle import random_ids
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from flexpatch.internals import decoder_of, layers_of, text_config
from flexpatch.masks import block_mask
from flexpatch.models import tiny_model, tiny_types
from flexpatch.registry import FULL, SLIDING, adapters
from flexpatch.rows import build_rows
from flexpatch.tree import Tree

NAME = "test_internals_probe"
HERE = f"transformers {transformers.__version__}, on which flexpatch/patch.py relies"
TYPES = tiny_types()


class Probe:
    """An attention function that keeps what it was given and returns what a model can go on with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        self.calls.append(dict(module=module, q=q, k=k, v=v, mask=attention_mask, **others))
        return q.transpose(1, 2).contiguous(), None


@pytest.fixture
def probe() -> Iterator[Probe]:
    """A probe in both registries under ``NAME``, taken out again."""
    probe = Probe()
    AttentionInterface.register(NAME, probe)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield probe
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(table)._global_mapping.pop(NAME)


def probed(model_type: str) -> transformers.PreTrainedModel:
    model = tiny_model(model_type)
    decoder_of(model).set_attn_implementation(NAME)
    return model


def ids(length: int = 12) -> Tensor:
    return torch.tensor(random_ids(length))


def test_the_registries_take_new_names(probe: Probe) -> None:
    for table, interface in (
        (ALL_ATTENTION_FUNCTIONS, AttentionInterface),
        (ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface),
    ):
        assert NAME in table, f"{HERE}: {interface.__name__}.register(name, function) no longer adds the name"
    assert ALL_ATTENTION_FUNCTIONS[NAME] is probe, f"{HERE}: the registry no longer returns what was registered"


def test_the_originals_can_be_looked_up() -> None:
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS, (
        f"{HERE}: ALL_ATTENTION_FUNCTIONS['sdpa'] is gone; ordinary calls of patched models need it"
    )
    for original in ("sdpa", "eager"):
        assert original in ALL_MASK_ATTENTION_FUNCTIONS, (
            f"{HERE}: ALL_MASK_ATTENTION_FUNCTIONS['{original}'] is gone; without it ordinary calls lose their padding"
        )


@pytest.mark.parametrize("model_type", TYPES)
def test_eager_attention_is_a_function_of_the_models_file(model_type: str) -> None:
    model = tiny_model(model_type)
    attention = type(attention_of(decoder_of(model.base_model).layers[0]))
    assert callable(vars(sys.modules[attention.__module__]).get("eager_attention_forward")), (
        f"{HERE}: {attention.__module__} has no eager_attention_forward; ordinary calls with 'eager' need it"
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_takes_a_registered_name(probe: Probe, model_type: str) -> None:
    model = probed(model_type)
    assert text_config(model)._attn_implementation == NAME, (
        f"{HERE}: set_attn_implementation no longer sets config._attn_implementation to a custom name"
    )
    model(input_ids=ids())
    assert [call["module"] for call in probe.calls] == [
        attention_of(layer) for layer in decoder_of(model.base_model).layers
    ], f"{HERE}: {type(model).__name__} does not call the attention function registered under its name in every layer"
    model.set_attn_implementation("eager")
    assert text_config(model)._attn_implementation == "eager", f"{HERE}: an implementation cannot be set back"


@pytest.mark.parametrize("model_type", TYPES)
def test_what_the_attention_function_gets(probe: Probe, model_type: str) -> None:
    model = probed(model_type)
    config = text_config(model)
    model(input_ids=ids())
    call = probe.calls[0]
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, call["q"].shape[-1]
    shapes = [tuple(call[x].shape[: 4 if x != "v" else 3]) for x in "qkv"]  # DeepSeek's values have another size
    assert shapes == [(1, heads, 12, size), (1, groups, 12, size), (1, groups, 12)], (
        f"{HERE}: queries, keys and values are no longer (batch, heads, tokens, size) with keys and values unrepeated"
    )
    for option in ("scaling", "dropout"):
        assert option in call, f"{HERE}: '{option}' is no longer a keyword argument of the attention function"
    if model_type == "gemma2":
        assert call["softcap"] == config.attn_logit_softcapping, (
            f"{HERE}: Gemma 2's soft cap no longer reaches the attention function as 'softcap'"
        )
    if model_type == "gpt_oss":
        assert call["s_aux"].shape == (heads,), (
            f"{HERE}: gpt-oss's sinks no longer reach the attention function as 's_aux', one of each head"
        )


def attention_of(layer: nn.Module) -> nn.Module:
    return layer.attention if isinstance(layer, GPTNeoXLayer) else layer.self_attn


def masks() -> dict[str, Callable[[], Any]]:
    rows = build_rows([[Tree.of(*random_ids(6, 3, 3))]])
    return {
        "BlockMask": lambda: block_mask(rows.ends, rows.position_ids, None),
        "bool": lambda: torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(),
        "additive": lambda: torch.zeros(1, 1, 12, 12, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("model_type", TYPES)
def test_ready_masks_pass_through_untouched(probe: Probe, model_type: str, kind: str) -> None:
    """The same object, one for all layers or one for each type of layer; also with the cache left on."""
    model = probed(model_type)
    make = masks()[kind]
    if adapters()[model_type].masks == "single":
        given: Any = make()
        expected = [given] * len(decoder_of(model.base_model).layers)
        how = "a 4-D mask"
    else:
        given = {layer: make() for layer in (FULL, SLIDING)}
        expected = [given[layer] for layer in text_config(model).layer_types]
        how = "a dict of 4-D masks keyed by config.layer_types"
    for use_cache in (False, True):
        probe.calls.clear()
        # Gemma 4 slices its masks otherwise.
        model(input_ids=ids(), attention_mask=given, use_cache=use_cache, logits_to_keep=torch.tensor([0]))
        assert all(call["mask"] is mask for call, mask in zip(probe.calls, expected, strict=True)), (
            f"{HERE}: {how} ({kind}) no longer reaches {type(model).__name__}'s attention function untouched "
            f"(use_cache={use_cache})"
        )


def test_block_masks_have_four_dimensions() -> None:
    mask = masks()["BlockMask"]()
    assert isinstance(mask, BlockMask) and len(mask.shape) == 4, (
        f"torch {torch.__version__}: transformers passes a BlockMask through only if its shape has four entries"
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_positions_reach_rope(probe: Probe, model_type: str) -> None:
    """Two tokens that are alike have the same query exactly if their position ids are the same."""
    model = probed(model_type)
    same = torch.full((1, 12), 5)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]])
    model(input_ids=same, position_ids=positions, attention_mask=mask_for(model), use_cache=False)
    q = probe.calls[0]["q"][0].transpose(0, 1)
    assert torch.equal(q[4:8], q[8:12]), f"{HERE}: queries depend on more than token and position_ids"
    assert not torch.equal(q[4], q[5]), f"{HERE}: position_ids no longer reach rope"
    assert not torch.equal(q[8], q[7]), f"{HERE}: position_ids no longer reach rope"


def mask_for(model: nn.Module) -> Any:
    mask = masks()["bool"]()
    single = adapters()[model.config.model_type].masks == "single"
    return mask if single else dict.fromkeys(text_config(model).layer_types, mask)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_to_keep_takes_columns(model_type: str) -> None:
    model = tiny_model(model_type)
    keep = torch.tensor([0, 3, 4, 11])
    with torch.no_grad():
        whole = model(input_ids=ids()).logits
        some = model(input_ids=ids(), logits_to_keep=keep).logits
    assert some.shape == (1, 4, text_config(model).vocab_size) and torch.allclose(
        some, whole[:, keep], rtol=0, atol=1e-12
    ), f"{HERE}: {type(model).__name__}(logits_to_keep=<1-D tensor>) no longer returns those columns of the logits"


@pytest.mark.parametrize("model_type", TYPES)
def test_configurations_say_what_adapters_read(model_type: str) -> None:
    config = text_config(tiny_model(model_type))
    assert config.get_text_config() is config, f"{HERE}: a text model's get_text_config() is no longer itself"
    assert isinstance(config.rope_parameters, dict), f"{HERE}: {model_type} keeps rope settings elsewhere"
    if adapters()[model_type].masks == "by_layer_type":
        assert set(config.layer_types) <= {FULL, SLIDING}, f"{HERE}: {model_type} has new layer types"
    else:
        assert not getattr(config, "layer_types", None), (
            f"{HERE}: {model_type} has layer types now; its decoder may take a dict of masks"
        )


@pytest.mark.parametrize("model_type", TYPES)
def test_a_backbone_is_called_once_as_a_module_and_its_hidden_states_are_all_that_counts(model_type: str) -> None:
    """Folding: one hook sees the batch, the other's hidden states become the logits."""
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
    assert torch.equal(model(batch, use_cache=False).logits, expected), f"{HERE}: logits need more than hidden states"
    assert len(calls) == 1, f"{HERE}: base_model is called {len(calls)} times"
    assert calls[0]["input_ids"] is batch and calls[0]["use_cache"] is False, (
        f"{HERE}: the backbone no longer gets the caller's own arguments"
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_other_arguments_reach_the_attention_function(probe: Probe, model_type: str) -> None:
    """By one of them it knows that our hook has seen the call."""
    probed(model_type)(ids(), some_argument=True)
    assert all(call.get("some_argument") is True for call in probe.calls), (
        f"{HERE}: arguments of a call no longer reach the attention function"
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_hidden_states_of_the_backbone_leave_the_model(model_type: str) -> None:
    """Log-probs travel as them, and no position needs logits."""
    model, marker = tiny_model(model_type), torch.zeros(3)

    def mark(module: nn.Module, args: Any, output: Any) -> Any:
        output.hidden_states = (marker,)
        return output

    model.base_model.register_forward_hook(mark)
    output = model(ids(), use_cache=False, logits_to_keep=torch.empty(0, dtype=torch.int64))
    assert output.hidden_states[0] is marker, f"{HERE}: a backbone's hidden_states are no longer passed on"
    assert output.logits.shape[1] == 0, f"{HERE}: logits of positions that were not asked for are computed"


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_are_in_a_list_and_have_a_checkpointing_flag_each(model_type: str) -> None:
    model = tiny_model(model_type)
    layers = layers_of(model.base_model)
    assert len(layers) == text_config(model).num_hidden_layers, f"{HERE}: decoder layers are kept elsewhere"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in layers), f"{HERE}: layers have no flag each any more"


@pytest.mark.parametrize("model_type", TYPES)
def test_a_text_stack_holds_the_text_configuration_itself(model_type: str) -> None:
    """Its attention implementation is set there, and read there by its layers."""
    model = tiny_model(model_type)
    layers = decoder_of(model.base_model).layers
    assert all(attention_of(layer).config is model.config.get_text_config() for layer in layers), (
        f"{HERE}: the text layers of {type(model).__name__} no longer hold config.get_text_config()"
    )
