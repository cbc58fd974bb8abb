"""Models whose attention is their own, out of transformers' registry, and the limits of each of them."""

import copy
from typing import Any

import pytest
import torch
import transformers
from helpers.hybrids import apart, batch, step, twins
from helpers.oracle import random_ids
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch import FlexpatchError, FlexpatchWarning, Tree, UnsupportedModelError, build_rows
from flexpatch.float64 import Float64
from flexpatch.models import tiny_config, tiny_model, tiny_types
from flexpatch.registry import adapters
from flexpatch.unshare import Separate

TYPES = [t for t, adapter in adapters().items() if adapter.masks == "own" and t in tiny_types()]
if not TYPES:
    pytest.skip("needs the newest transformers", allow_module_level=True)
BOUND = 1e-10
FAST = ("bloom", "falcon")
kinds = pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in TYPES])


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


def read(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits of tokens, and the gradient of their log-probs."""
    logits = model(**call).logits[call["attention_mask"].bool()]
    logits.log_softmax(-1)[:, 3:20].pow(2).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return logits.detach(), torch.cat(grads)


@pytest.mark.parametrize("side", ["right", "left"])
@kinds
def test_folded_batches(kind: str, side: str) -> None:
    """Exact, or as given and counted with its reason; and the implementation keeps its name."""
    stock, model = twins(kind)
    assert model.config._attn_implementation == stock.config._attn_implementation
    with Float64():
        true = read(stock, batch(side))
        if side == "left" and "on the left" in adapters()[kind].limits:
            with pytest.warns(FlexpatchWarning, match=r"padding (in front|on the left)"):
                assert all(map(torch.equal, read(model, batch(side)), true))
            return
        assert apart(read(model, batch(side)), true) < BOUND
    assert flexpatch.savings(model).folded == 1


@kinds
def test_recomputed_layers(kind: str) -> None:
    if kind == "xglm":
        pytest.skip("in float64 it runs under Float64 alone, which torch takes off in backward")
    _, model = twins(kind)
    if not model.supports_gradient_checkpointing:
        pytest.skip("nor does the unpatched model")
    true = step(model.train(), batch("right"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert apart(step(model, batch("right")), true) < BOUND


@kinds
def test_removed(kind: str) -> None:
    stock, model = twins(kind)
    with Float64():
        step(model, batch("right"))
    assert flexpatch.is_applied(model)
    flexpatch.remove(model)
    assert not flexpatch.is_applied(model)
    with Float64():
        assert all(map(torch.equal, step(model, batch("right")), step(stock, batch("right"))))


@pytest.mark.parametrize("variant", range(3))
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_attentions_of_falcon(implementation: str, variant: int) -> None:
    """With ALiBi its eager attention adds the bias twice, which its sdpa does not: each is as it is unpatched."""
    stock = tiny_model("falcon", variant)
    stock.config._attn_implementation = implementation
    model = flexpatch.apply(copy.deepcopy(stock))
    with Float64():
        assert apart(read(model, batch("right")), read(stock, batch("right"))) < BOUND
    assert flexpatch.savings(model).folded == 1


def test_a_bias_of_keys_that_is_not_the_sequences_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the tests above: the bias of the row's later keys."""
    stock, model = twins("bloom")
    argument = Separate._argument

    def wrong(self: Any, name: str, x: Any, index: Tensor) -> Any:
        return argument(self, name, x.flip(-1) if name == "alibi" else x, index)

    monkeypatch.setattr(Separate, "_argument", wrong)
    with Float64():
        assert apart(read(model, batch("right")), read(stock, batch("right"))) > 1000 * BOUND


def test_an_implementation_set_after_apply_runs_as_given() -> None:
    """Rows' masks would be of another kind."""
    model = flexpatch.apply(tiny_model("falcon"))
    model.config._attn_implementation = "eager"
    with pytest.warns(FlexpatchWarning, match="was changed after flexpatch.apply"):
        model(**batch("right"))
    with pytest.raises(FlexpatchError, match="does not take packed rows yet"):
        flexpatch.model_inputs(model, build_rows([[Tree.of([5], [6], [7])]]))


def test_rows_as_long_as_mpts_bias() -> None:
    """Its shape is then that of a tensor with one entry for each token."""
    stock = tiny_model("mpt")
    length = stock.config.max_seq_len
    trees = [Tree.of(*random_ids(200, 180, 132))]
    rows = build_rows([trees])
    assert rows.input_ids.shape[1] == length
    with Float64():
        true = flexpatch.separate_logprobs(stock, trees).tokens
        ours = flexpatch.answer_logprobs(flexpatch.apply(stock), rows).tokens
    assert (ours - true).abs().max() < BOUND


def test_flash_attention_of_a_models_own_is_refused() -> None:
    """It takes no mask of separate sequences."""
    model = tiny_model("gpt_neo")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="load it with attn_implementation='eager'"):
        flexpatch.apply(model)


@parameterized.expand([("dropout",), ("activation_dropout",)])
def test_dropout_that_is_no_module(name: str) -> None:
    config = tiny_config("xglm")
    setattr(config, name, 0.1)
    model = type(tiny_model("xglm"))(config).train()
    with pytest.raises(UnsupportedModelError, match=r"dropout 0.1 in .* is active in training"):
        flexpatch.apply(model)


def test_layers_left_out_at_random_are_refused() -> None:
    config = tiny_config("xglm")
    config.layerdrop = 0.1
    with pytest.raises(UnsupportedModelError, match=r"layerdrop 0\.1"):
        flexpatch.apply(type(tiny_model("xglm"))(config))


# --- Doge and BLT ----------------------------------------------------------------------------------------------------


def doge(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config("doge").to_dict() | settings
    return transformers.DogeForCausalLM(transformers.DogeConfig(**config)).double().eval()


def test_sequences_of_which_doge_would_choose_keys() -> None:
    """Rows are refused, batches run as given; one token less is exact."""
    model = flexpatch.apply(doge(keep_window_size=30))
    prompt, a, b = random_ids(20, 11, 11)
    flexpatch.model_inputs(model, build_rows([[Tree.of(prompt, a[:10], b[:10])]]))
    with pytest.raises(UnsupportedModelError, match=r"a sequence has 31 tokens, .* not exact with more than 30"):
        flexpatch.model_inputs(model, build_rows([[Tree.of(prompt, a, b)]]))
    with pytest.warns(FlexpatchWarning, match="sequences of more than 30 tokens"):
        model(input_ids=torch.tensor([prompt + a, prompt + b]), use_cache=False)


def test_doge_alone_chooses_among_equal_tokens() -> None:
    """The reason of that limit: keys of equal tokens weigh the same in its first layer."""
    attention = doge(keep_window_size=4).model.layers[0].self_attn
    value = torch.randn(1, 1, 64, dtype=torch.float64).expand(1, 8, 64)
    weights = attention.dt_proj(attention.v_proj(value)).exp()
    assert (weights == weights[:, :1]).all()


def test_doges_experts_are_refused_because_tokens_see_later_ones() -> None:
    model = doge(is_moe=True, num_experts=16, num_experts_per_tok=2)
    ids = torch.tensor(random_ids(12))
    other = ids.clone()
    other[0, -1] = 9 if ids[0, -1] != 9 else 8
    with torch.no_grad(), Float64():
        assert (model(ids).logits - model(other).logits)[0, :-1].abs().max() > 1e-6
    with pytest.raises(UnsupportedModelError, match="see later ones"):
        flexpatch.apply(model)


def test_blts_bytes_are_embedded_with_those_before_them_in_its_backbones_forward() -> None:
    """The reason of its refusal: the second answer of a row is embedded with the first one's bytes, in no module."""
    small = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    parts = ("encoder_config", "decoder_config", "global_config", "patcher_config")
    torch.manual_seed(0)
    model = transformers.BltForCausalLM(
        transformers.BltConfig(encoder_hash_byte_group_vocab=64, **dict.fromkeys(parts, small))
    ).eval()
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["inputs_embeds"])
        raise ZeroDivisionError

    model.model.local_encoder.register_forward_pre_hook(stop, with_kwargs=True)
    prompt, first, second = random_ids(6, 5, 5)
    for ids in (prompt + first + second, prompt + second):
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([ids]), use_cache=False)
    assert torch.equal(inputs[0][:, :6], inputs[1][:, :6])
    assert (inputs[0][:, -5:-3] - inputs[1][:, -5:-3]).abs().max() > 1e-3
    with pytest.raises(UnsupportedModelError, match="all of it would have to run on separate sequences"):
        flexpatch.apply(model)
