"""Ordinary calls that a fold could make wrong: their caches, traces of them, hooks around them, and who is told."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import WRAPPER_ASSIGNMENTS, partial
from typing import Any

import pytest
import torch
from helpers.oracle import BOUNDS, random_ids, see_siblings
from parameterized import parameterized
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import flexpatch
from flexpatch import FlexpatchError, FlexpatchWarning, UnsupportedModelError
from flexpatch.calls import being_recorded
from flexpatch.forward import hook_of
from flexpatch.models import tiny_model, tiny_types

# Float32 models whose unpatched copies are the oracle: what runs as given has the same bits.
ROUNDED = 1e-4


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: args[1].computed < args[1].padded)


def twins(model_type: str = "llama") -> tuple[nn.Module, nn.Module]:
    """A model, unpatched and patched."""
    stock = tiny_model(model_type, dtype=torch.float32)
    return stock, flexpatch.apply(copy.deepcopy(stock))


def batch(shared: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Three sequences of 6 to 8 tokens, of which the first ``shared`` are alike."""
    ids = torch.tensor(random_ids(8, 8, 8, seed=seed))
    ids[:, :shared] = ids[0, :shared]
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return dict(input_ids=ids, attention_mask=mask)


NOTHING_TO_SHARE = {"input_ids": torch.tensor(random_ids(7, 7, seed=3))}
ONE_SEQUENCE = {"input_ids": torch.tensor(random_ids(7, seed=3))}


# --- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [True, False, None])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_whether_a_caller_gets_a_cache_does_not_depend_on_the_batch(training: bool, grad: bool, default: Any) -> None:
    """It is the unpatched model's answer, or a word says that it is not."""
    stock, model = (m.train(training) for m in twins())
    for m in (stock, model):
        m.config.use_cache = True if default is None else default
    asked = {"use_cache": True} if default is None else {}
    got, said = set(), False
    for call in (batch(), batch(shared=0), NOTHING_TO_SHARE, ONE_SEQUENCE):
        with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expected = stock(**call, **asked).past_key_values is not None
            found = model(**call, **asked).past_key_values is not None
        got.add((expected, found))
        said = said or any("past_key_values is None" in str(warning.message) for warning in caught)
    assert len(got) == 1, f"(unpatched, patched) have caches: {got}"
    ((expected, found),) = got
    assert expected == found or said
    assert expected == (default is not False)
    assert found or not (training and grad) or default in (True, False)


def test_a_call_without_gradients_continues_from_its_cache() -> None:
    stock, model = twins()
    more = torch.tensor(random_ids(3, 3, 3, seed=7))
    for training in (True, False):
        ends = []
        for m in (stock, model):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FlexpatchWarning)
                first = m.train(training)(batch()["input_ids"])
                ends.append(m(more, past_key_values=first.past_key_values).logits)
                control = m(more).logits
        assert torch.equal(*ends)
        assert (ends[0] - control).abs().max() > 1, "the prompt must matter"


def test_a_cache_that_was_asked_for_in_training_is_used() -> None:
    stock, model = (m.train() for m in twins())
    more = torch.tensor(random_ids(3, 3, 3, seed=7))
    ends = [m(more, past_key_values=m(batch()["input_ids"], use_cache=True).past_key_values) for m in (stock, model)]
    assert torch.equal(ends[0].logits, ends[1].logits)


def test_checkpointing_drops_caches_by_itself() -> None:
    """So nothing is said: the unpatched model returns none either."""
    model = tiny_model("llama", dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model(**batch()).past_key_values is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlexpatchWarning)
        assert flexpatch.apply(model)(**batch()).past_key_values is None
    assert flexpatch.savings(model).folded == 1


# --- holes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "flex"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "gpt_oss"])
def test_the_first_token_behind_a_hole_keeps_its_log_prob(model_type: str, backend: str, flex_on_cpu: None) -> None:
    """Prompt, padding, completion: a right-padded prompt with its completion appended. Trainers read the completion's
    first log-prob at padding, and send a gradient back through it."""
    model = tiny_model(model_type)
    prompts, completions = random_ids(12, 7, seed=1), [random_ids(5, 3, seed=seed) for seed in (2, 3)]
    ids, mask = torch.zeros(4, 17, dtype=torch.int64), torch.zeros(4, 17, dtype=torch.int64)
    for n in range(4):
        prompt, completion = prompts[n // 2], completions[n // 2][n % 2]
        ids[n, : len(prompt)], mask[n, : len(prompt)] = torch.tensor(prompt), 1
        ids[n, 12 : 12 + len(completion)], mask[n, 12 : 12 + len(completion)] = torch.tensor(completion), 1

    def read(m: nn.Module) -> tuple[Tensor, Tensor]:
        m.zero_grad()
        logits = m(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 11:-1]
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 12:, None])[..., 0][mask[:, 12:].bool()]
        tokens.sum().backward()
        return tokens.detach(), torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    tokens, gradient = read(model)
    flexpatch.apply(model, backend=backend)
    ours, our_gradient = read(model)
    rounding = 1e-5 if model_type in ("gemma2", "gpt_oss") else 1e-6  # eager attention has a float32 softmax
    assert (ours - tokens).abs().max() < rounding
    assert (our_gradient - gradient).norm() < rounding * gradient.norm()
    assert flexpatch.savings(model).folded == 1
    with pytest.MonkeyPatch.context() as control:
        control.setattr("flexpatch.fold.predicting_padding", lambda mask: mask & False)
        hook_of(model).folding.latest = None
        assert (read(model)[0] - tokens).abs().max() > 0.01


@parameterized.expand(["llama", "gemma3_text"])
def test_a_loss_over_left_padded_sequences(model_type: str) -> None:
    """Labels that are hidden by the mask alone: the first token of a sequence is predicted at padding."""
    model = tiny_model(model_type)
    call = batch()
    call = {name: tensor.flip(1) for name, tensor in call.items()}
    call["labels"] = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    before = model(**call, use_cache=False).loss
    assert (flexpatch.apply(model)(**call, use_cache=False).loss - before).abs() < 1e-6
    assert flexpatch.savings(model).folded == 1


# --- recorders -------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """What recorders want: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


RECORDERS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Any]] = {
    "jit trace": lambda module, example: torch.jit.trace(module, example, check_trace=False),
    "export": lambda module, example: torch.export.export(module, example).module(),
    "strict export": lambda module, example: torch.export.export(module, example, strict=True).module(),
}


@parameterized.expand([(each,) for each in RECORDERS])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flexpatch")
def test_recorded_models_run_any_batch(recorder: str) -> None:
    """A recorded fold would belong to the ids it was recorded with."""
    stock, model = twins()
    recorded = RECORDERS[recorder](Logits(model), tuple(batch().values()))
    for shared, seed in ((5, 0), (0, 1), (3, 2)):
        other = batch(shared, seed)
        with torch.no_grad():
            assert torch.equal(recorded(*other.values()), stock(**other).logits)
    assert flexpatch.savings(model).folded == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:flexpatch", "ignore::DeprecationWarning")
def test_a_recorded_fold_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the above."""
    monkeypatch.setattr("flexpatch.calls.being_recorded", lambda ids: False)
    stock, model = twins()
    recorded = torch.jit.trace(Logits(model), tuple(batch().values()), check_trace=False)
    other = batch(0, 1)
    with torch.no_grad():
        error = recorded(*other.values()) - stock(**other).logits
    assert error[other["attention_mask"].bool()].abs().max() > 0.5


def test_ids_without_values_are_recorded() -> None:
    """They have nothing to fold by: fake and meta tensors, and those that vmap makes."""
    ids = batch()["input_ids"]
    assert not being_recorded(ids)
    assert being_recorded(ids.to("meta"))
    with FakeTensorMode() as mode:
        assert being_recorded(mode.from_tensor(ids))
    within: list[bool] = []
    torch.func.vmap(lambda row: within.append(being_recorded(row)) or row)(ids)
    make_fx(lambda x: within.append(being_recorded(x)) or x + 1)(ids)
    assert within == [True, True]


def test_transforms_of_torch_func() -> None:
    """The numbers of ids cannot be read within a gradient: the batch runs as it was given. vmap over weights folds."""
    stock, model = (model.double() for model in twins())
    given = batch() | dict(use_cache=False)

    def gradient(model: nn.Module) -> dict[str, torch.Tensor]:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        return torch.func.grad(lambda some: functional_call(model, some, (), given).logits.square().mean())(weights)

    with pytest.warns(flexpatch.FlexpatchWarning, match="being traced"):
        ours = gradient(model)
    assert all(torch.equal(ours[name], true) for name, true in gradient(stock).items())
    assert flexpatch.savings(model).folded == 0
    several = {name: torch.stack([weight.detach(), 2 * weight.detach()]) for name, weight in model.named_parameters()}
    ours = torch.func.vmap(lambda some: functional_call(model, some, (), given).logits)(several)
    true = [functional_call(stock, {n: w[i] for n, w in several.items()}, (), given).logits for i in range(2)]
    assert ((ours - torch.stack(true)).abs().amax(-1) * given["attention_mask"]).max() < 1e-6
    assert flexpatch.savings(model).folded == 1


# --- hooks of others -------------------------------------------------------------------------------------------------


def test_ids_that_are_replaced_after_our_hook_are_an_error() -> None:
    """The row's hidden states would come back as if they were the batch's: (1, 9, V) for (3, 8, V)."""
    _, model = twins()

    def replaced(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
        return args, call | {"input_ids": call["input_ids"].clone()}

    def everything(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
        names = ("input_ids", "attention_mask", "position_ids", "use_cache")
        return (), {name: call[name].clone() if name == "input_ids" else call.get(name) for name in names}

    for hook in (replaced, everything):
        handle = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
        with pytest.raises(FlexpatchError, match=r"something replaced input_ids.*before flexpatch.apply"):
            model(**batch(), use_cache=False)
        assert model(**NOTHING_TO_SHARE, use_cache=False).logits.shape == (2, 7, 151)
        handle.remove()


def test_hooks_that_come_first_or_keep_the_ids_are_welcome() -> None:
    stock, _ = twins()
    expected = stock(**batch(), use_cache=False).logits[batch()["attention_mask"].bool()]
    early = copy.deepcopy(stock)
    early.base_model.register_forward_pre_hook(
        lambda module, args, call: (args, call | {"input_ids": call["input_ids"].clone()}), with_kwargs=True
    )
    positional = flexpatch.apply(copy.deepcopy(stock))
    positional.base_model.register_forward_pre_hook(
        lambda module, args, call: ((call.pop("input_ids"),), call), with_kwargs=True
    )
    for model in (flexpatch.apply(early), positional):
        ours = model(**batch(), use_cache=False).logits
        assert (ours[batch()["attention_mask"].bool()] - expected).abs().max() < ROUNDED
        assert flexpatch.savings(model).folded == 1


def test_steering_one_sequence_from_inside_a_layer() -> None:
    """A hook in a layer sees the row; within disabled() it sees the batch."""
    stock, model = twins()

    def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:1] + 1, output[1:]])

    for m in (stock, model):
        m.model.layers[1].mlp.register_forward_hook(steer)
    real = batch()["attention_mask"].bool()
    expected = stock(**batch(), use_cache=False).logits
    assert (model(**batch(), use_cache=False).logits - expected)[real].abs().max() > 0.1, "a limit, in the docs"
    with flexpatch.disabled(model) as same:
        assert same is model
        with flexpatch.disabled(model):
            pass
        assert torch.equal(model(**batch(), use_cache=False).logits, expected)
    assert flexpatch.savings(model).batches == 1
    model(**batch(), use_cache=False)
    assert flexpatch.savings(model).folded == 2
    with pytest.raises(RuntimeError, match="leaves the block early"), flexpatch.disabled(model):
        raise RuntimeError("leaves the block early")
    model(**batch(), use_cache=False)
    assert flexpatch.savings(model).folded == 3
    with flexpatch.disabled(stock):  # never patched
        assert torch.equal(stock(**batch(), use_cache=False).logits, expected)


def test_a_forward_whose_wrapper_hides_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = twins()
    cls = type(model.base_model)
    original = cls.forward
    expected = stock.base_model(batch()["input_ids"], batch()["attention_mask"], use_cache=False)[0]
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    with pytest.warns(FlexpatchWarning, match="whose wrapper hides the names"):
        ours = model.base_model(batch()["input_ids"], batch()["attention_mask"], use_cache=False)[0]
    assert torch.equal(ours, expected)
    model(**batch(), use_cache=False)  # by name
    assert flexpatch.savings(model).folded == 1


# --- checkpointing of others -----------------------------------------------------------------------------------------


def wrapped_by_llama_factory(function: Any) -> Any:
    @functools.wraps(function, assigned=(*WRAPPER_ASSIGNMENTS, "__self__"))
    def custom(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return function(layer, *args, **kwargs)

    return custom


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "wraps": wrapped_by_llama_factory,
    "plain function": lambda function: lambda *args, **kwargs: function(*args, **kwargs),
    "partial of a wrapper": lambda function: partial(wrapped_by_llama_factory(function)),
    "object": lambda function: type("Checkpoint", (), {"__call__": lambda self, *args: function(*args)})(),
}


@parameterized.expand([(each,) for each in WRAPPERS])
def test_a_checkpointing_function_may_be_anything(wrapper: str) -> None:
    stock, model = (m.train() for m in twins())
    gradients = []
    for m in (stock, model):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in m.model.layers:
            layer._gradient_checkpointing_func = WRAPPERS[wrapper](layer._gradient_checkpointing_func)
        logits = m(**batch(), use_cache=False).logits[batch()["attention_mask"].bool()]
        logits.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < ROUNDED * gradients[0].norm()
    assert flexpatch.savings(model).folded == 1


@parameterized.expand(["wraps", "partial of a wrapper"])
def test_reentrant_checkpointing_is_found_within_wrappers(wrapper: str) -> None:
    """The last layers of Gemma 3n and 4 take keys of earlier ones, which get no gradient through it."""
    model_type = "gemma4_text" if "gemma4_text" in tiny_types() else "gemma3n_text"
    model = flexpatch.apply(tiny_model(model_type)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = WRAPPERS[wrapper](layer._gradient_checkpointing_func)
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        model(**batch(), use_cache=False)


@parameterized.expand([0, 1])
def test_an_interrupted_step_leaves_no_setting_behind(again: int) -> None:
    """Ctrl-C skips our hook after the backbone. What the user sets before the next step holds."""
    model = flexpatch.apply(tiny_model("llama", dtype=torch.float32), recompute_layers=again).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.model.layers

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def flags() -> list[bool]:
        return [bool(layer.gradient_checkpointing) for layer in layers]

    def interrupted() -> None:
        handle = layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch(), use_cache=False)
        handle.remove()

    interrupted()
    model.gradient_checkpointing_disable()
    model(**batch(), use_cache=False)
    assert flags() == [False] * 4, "the user switched checkpointing off"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    interrupted()
    model(**batch(), use_cache=False)
    assert flags() == [True] * 4, "nobody did"
    interrupted()
    flexpatch.remove(model)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * 4


# --- mistakes --------------------------------------------------------------------------------------------------------


@parameterized.expand([(flexpatch.apply,), (flexpatch.remove,)])
def test_what_is_no_model(call: Any) -> None:
    model = tiny_model("llama")
    two = nn.ModuleDict({"policy": model, "value": tiny_model("llama", 1)})
    cases = [
        (None, "expected a loaded transformers model.*, got NoneType"),
        ("org/name", r"got the name 'org/name': AutoModelForCausalLM.from_pretrained\('org/name'\)"),
        (type(model), "got the class LlamaForCausalLM: pass an instance"),
        ({"model": model}, "got dict"),
        (two, "ModuleDict holds several transformers models, 'value' beside the first: pass them one at a time"),
    ]
    for given, message in cases:
        with pytest.raises(FlexpatchError, match=message):
            call(given)
    assert not flexpatch.is_applied(model) and not model.base_model._forward_pre_hooks


def test_rows_are_no_batch_and_a_batch_is_no_rows() -> None:
    model = flexpatch.apply(tiny_model("llama"))
    rows = flexpatch.build_rows([[flexpatch.Tree.of(*random_ids(4, 3, 2))]])
    for given in (batch(), [rows], None):
        with pytest.raises(FlexpatchError, match=f"expected packed rows, got {type(given).__name__}"):
            flexpatch.answer_logprobs(model, given)
    uses: list[Callable[[Any], Any]] = [
        lambda r: r["input_ids"], lambda r: r.items(), lambda r: dict(r), lambda r: "labels" in r, lambda r: {**r},
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(FlexpatchError, match=r"as if they were a batch.*flexpatch.apply\(model\) folds those"):
            use(rows)


def test_a_model_made_from_a_patched_one_says_what_it_lacks() -> None:
    model = flexpatch.apply(tiny_model("llama"))
    reference = type(model)._from_config(model.config, attn_implementation=model.config._attn_implementation)
    with pytest.raises(FlexpatchError, match=r"has no hooks: all its batches run as they are given.*ref_model"):
        flexpatch.savings(reference)
    with pytest.raises(FlexpatchError, match=r"call flexpatch.apply\(model\) first"):
        flexpatch.savings(flexpatch.remove(model))


def test_copies_of_rows_never_keep_a_mask() -> None:
    """Neither a copy with other ends, nor rows whose tensors were written to."""
    model = flexpatch.apply(tiny_model("llama"))
    rows = flexpatch.build_rows([[flexpatch.Tree.of(*random_ids(14, 9, 9))]])
    with torch.no_grad():
        right = flexpatch.answer_logprobs(model, rows).tokens
        ends = see_siblings(rows).ends
        wrong = flexpatch.answer_logprobs(model, replace(rows, ends=ends)).tokens
        assert (wrong - right).abs().max() > 0.01
        assert torch.equal(flexpatch.answer_logprobs(model, rows).tokens, right)
        rows.ends.copy_(ends)
        assert (flexpatch.answer_logprobs(model, rows).tokens - wrong).abs().max() < BOUNDS[0]
