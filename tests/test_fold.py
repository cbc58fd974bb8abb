"""Ordinary batches, folded: the unpatched model's hidden states, logits and gradients, whatever the batch."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.batches import KINDS, padded_batch, random_batch, tensors
from helpers.forests import row_prefixes, visible
from helpers.oracle import see_siblings
from parameterized import parameterized
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import flexpatch
from flexpatch import FlexpatchError, FlexpatchWarning, UnsupportedModelError, patch
from flexpatch.calls import CACHES, gains
from flexpatch.counts import Counts, Savings
from flexpatch.float64 import Float64 as _Float64
from flexpatch.fold import (
    Folded,
    _filled_lookup,
    fold_batch,
    follow_columns,
    lookup,
    predicting_padding,
)
from flexpatch.internals import SCALES_BY_INDEX
from flexpatch.models import TINY, tiny_model, tiny_types
from flexpatch.registry import adapters

BOUND = 1e-10
# Where float64 cannot be kept throughout (checkpointing): transformers' norms and ropes round to float32, and a last
# bit can flip that.
ROUNDED = 1e-7


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests with few tokens must fold too; those about gains ask for the real rule."""
    if "real_gains" not in request.keywords:
        monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


@pytest.fixture(autouse=True)
def _no_unfolded_batches() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlexpatchWarning)
        yield


def hidden(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Last hidden states wherever one may be read: at tokens, and at padding that predicts one."""
    mask = batch["attention_mask"].bool().numpy()
    with torch.no_grad(), _Float64():
        return model.base_model(**batch).last_hidden_state[torch.from_numpy(mask | predicting_padding(mask))]


def fuzz(models: list[nn.Module], batches: int) -> float:
    """Largest difference of hidden states between unpatched models and their patched copies, over random batches."""
    patched = [flexpatch.apply(copy.deepcopy(model)) for model in models]
    worst = 0.0
    for seed in range(batches):
        batch = tensors(*random_batch(np.random.default_rng(seed)))
        if len(batch["input_ids"]) == 1:
            batch["attention_mask"][0, -1] = 1  # or there would be no reason to fold
        k = seed % len(models)
        before, after = hidden(models[k], batch), hidden(patched[k], batch)
        if not before.isfinite().all():
            raise AssertionError(f"batch {seed}: the unpatched model is not finite")
        worst = max(worst, float((before - after).abs().max()))
    folded = [flexpatch.savings(model) for model in patched]
    assert sum(s.batches for s in folded) == batches
    assert sum(s.shared for s in folded) > 5 * batches, "the batches share too little to show anything"
    return worst


def test_random_batches_have_the_hidden_states_of_the_unpatched_model() -> None:
    assert fuzz([tiny_model(*kind) for kind in KINDS], 200) < BOUND


@pytest.mark.slow
def test_1000_random_batches_have_them_too() -> None:
    assert fuzz([tiny_model(*kind) for kind in KINDS], 1000) < BOUND


def test_random_batches_through_flex(flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.mask_dtype", lambda *args: None)
    assert fuzz([tiny_model(*kind) for kind in KINDS], 40) < BOUND


@parameterized.expand(["siblings", "positions", "index", "window", "predicting padding"])
def test_the_fuzz_can_fail(broken: str) -> None:
    def break_it(ids: np.ndarray, mask: np.ndarray | None = None, worth: Any = None) -> Folded | None:
        folded = fold_batch(ids, mask)
        if folded is None:
            return None
        rows, index = folded.rows, folded.index
        if broken == "siblings":
            rows = see_siblings(rows)
        if broken == "positions":
            rows = copy.copy(rows)
            object.__setattr__(rows, "position_ids", torch.arange(rows.input_ids.shape[1])[None])
            object.__setattr__(rows, "depth", rows.input_ids.shape[1])
        if broken == "index":
            index = (index - 1).clamp(min=0)
        if broken == "window":
            object.__setattr__(rows, "depth", 1)  # no window is reached
        if broken == "predicting padding" and mask is not None:
            index = torch.where(torch.from_numpy(predicting_padding(mask)), int(index.max()), index)
        return Folded(rows, index, folded.padding, folded.counts)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.folding.fold_batch", break_it)
        patched.setattr("flexpatch.folding.gains", lambda *args: True)
        assert fuzz([tiny_model(*kind) for kind in KINDS], 40) > 1e6 * BOUND


def test_rows_are_what_they_mean() -> None:
    """Every token of a row stands for one prefix; each position of the batch points to its own."""
    for seed in range(300):
        ids, mask = random_batch(np.random.default_rng(seed))
        folded = fold_batch(ids, mask)
        assert folded is not None
        row, positions = folded.rows.input_ids[0].numpy(), folded.rows.position_ids[0].numpy()
        ends, index = folded.rows.ends[0].numpy(), folded.index.numpy()
        tokens = len(row) - (folded.padding is not None)
        predicting = predicting_padding(mask)
        prefixes: set[Any] = set()
        for n in range(len(ids)):
            columns = np.flatnonzero(mask[n])
            assert (row[index[n, columns]] == ids[n, columns]).all()
            assert (positions[index[n, columns]] == columns - columns[:1]).all()
            prefixes |= {
                tuple(zip(ids[n, columns[:i]], columns[:i] - columns[0], strict=True))
                for i in range(1, columns.size + 1)
            }
            for column in np.flatnonzero(predicting[n]):
                own, before = index[n, column], columns[columns < column]
                # It sees the tokens before it in its sequence, and nobody sees it.
                assert row[own] == ids[n, column] and ends[own] == own
                seen = np.flatnonzero((np.arange(len(row)) <= own) & (own < ends))
                assert seen.tolist() == index[n, before].tolist()
                assert positions[own] == (column - columns[0] if before.size else 0)
                distances = (*(before - columns[0]), column - columns[0]) if before.size else (0,)
                prefixes.add((*zip((*ids[n, before], ids[n, column]), distances, strict=True), "padding"))
        assert tokens == len(prefixes) == folded.counts.computed
        assert (index[~mask & ~predicting] == (-1 if folded.padding is None else folded.padding)).all()
        assert folded.counts.real == mask.sum() + predicting.sum() and folded.counts.padded == mask.size
        if not predicting.any():  # the definition knows neither holes nor padding that sees
            q = np.arange(tokens)
            seen = (q[None] <= q[:, None]) & (q[:, None] < ends[:tokens][None])
            assert (seen == visible(row_prefixes(row[:tokens], positions[:tokens]))).all()


@parameterized.expand([(*kind, reentrant) for kind in KINDS for reentrant in (None, True, False)])
def test_logits_losses_and_gradients(model_type: str, variant: int, reentrant: bool | None) -> None:
    """Through the head, in training, with both kinds of checkpointing, all hidden states asked for."""
    model, batch = tiny_model(model_type, variant).train(), padded_batch()
    if model_type == "gemma3":  # older releases of transformers insist on them in training
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    def step() -> tuple[Tensor, ...]:
        model.zero_grad()
        real = batch["attention_mask"].bool()
        out = model(**batch, labels=batch["input_ids"].masked_fill(~real, -100), output_hidden_states=True)
        (out.loss + out.logits[real].square().mean()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return torch.cat([h[real].detach() for h in out.hidden_states]), out.logits[real].detach(), gradient

    before = step()
    flexpatch.apply(model)
    after = step()
    assert flexpatch.savings(model).factor > 2
    assert len(before[0]) == len(after[0])
    for one, other, bound in zip(before, after, (ROUNDED, ROUNDED, 1e-6), strict=True):
        assert (one - other).norm() <= bound * one.norm()


def test_the_gradient_of_a_shared_token_is_the_sum() -> None:
    """Loss terms on prompt positions of several sequences reach the one token that stands for them."""
    model, batch = tiny_model("llama"), padded_batch()
    real = batch["attention_mask"].bool()
    weights = torch.randn(*real.shape, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient() -> Tensor:
        embeddings = model.get_input_embeddings().weight
        states = model.base_model(**batch).last_hidden_state
        return torch.autograd.grad(((states * weights)[real]).square().sum(), embeddings)[0]

    before = gradient()
    model.config.use_cache = False
    assert torch.allclose(gradient(), before)
    flexpatch.apply(model)
    assert (gradient() - before).norm() < 1e-6 * before.norm()
    assert flexpatch.savings(model).folded == 1


def test_lora_and_its_reference() -> None:
    model = tiny_model("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    batch = padded_batch()
    before = [model(**batch).logits]
    with model.disable_adapter():
        before.append(model(**batch).logits)
    flexpatch.apply(model)
    after = [model(**batch).logits]
    with model.disable_adapter():
        after.append(model(**batch).logits)
    real = batch["attention_mask"].bool()
    assert all((a - b)[real].abs().max() < ROUNDED for a, b in zip(before, after, strict=True))
    assert (after[0] - after[1])[real].abs().max() > 0.01
    assert flexpatch.savings(model).folded == 2


def test_other_heads() -> None:
    """A reward model's head and a bare backbone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **{**TINY, **adapters()["llama"].tiny["llama"][0], "pad_token_id": 0, "num_labels": 1}
    )
    for kind in (AutoModelForSequenceClassification, AutoModel):
        model = kind.from_config(copy.deepcopy(config), dtype=torch.float64).eval()
        batch = padded_batch()
        with _Float64():
            before = model(**batch)[0]
            after = flexpatch.apply(model)(**batch)[0]
        real = batch["attention_mask"].bool() if kind is AutoModel else slice(None)
        assert (before - after)[real].abs().max() < BOUND
        assert flexpatch.savings(model).folded == 1


@parameterized.expand([torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    expected = hidden(model, batch)
    assert torch.equal(hidden(model, batch | {"attention_mask": batch["attention_mask"].to(dtype)}), expected)


def test_without_a_mask() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8], [3, 4, 5, 6]])
    with _Float64():
        before = model(ids, use_cache=False).logits
        after = flexpatch.apply(model)(ids, use_cache=False).logits
    assert (after - before).abs().max() < BOUND
    assert flexpatch.savings(model) == Savings(batches=1, folded=1, padded=12, computed=6, padding=0, shared=6)


class Ran:
    """Which batches a model folded, and that unfolded ones have the unpatched model's bits."""

    def __init__(self, **settings: Any) -> None:
        self.model = tiny_model("llama", dtype=torch.float32)
        for name, value in settings.items():
            setattr(self.model.config, name, value)
        self.batch = padded_batch()

    def __call__(self, folded: int, **changes: Any) -> Any:
        call = {name: value for name, value in (self.batch | changes).items() if value is not None}
        before = flexpatch.remove(self.model)(**call)
        after = flexpatch.apply(self.model)(**call)
        first, second = (
            [x for x in out.to_tuple() if isinstance(x, Tensor)] if hasattr(out, "to_tuple") else out[:1]
            for out in (before, after)
        )
        assert flexpatch.savings(self.model).folded == folded
        if not folded:
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return after


def test_calls_that_run_as_they_are_without_a_word() -> None:
    """They are no batches that could fold: one asks for its cache, the other has a single sequence."""
    ran = Ran()
    ran(0, use_cache=True)
    assert flexpatch.savings(ran.model).batches == 0
    ran(0, input_ids=ran.batch["input_ids"][:1], attention_mask=None)
    assert flexpatch.savings(ran.model).batches == 0


@parameterized.expand([(each,) for each in CACHES])
def test_a_given_cache_is_used(name: str) -> None:
    """Whatever the installed transformers calls it, also where no new entries are asked for."""
    model, batch = tiny_model("llama"), padded_batch()["input_ids"]
    if not any(name in signature(type(m).forward).parameters for m in (model, model.base_model)):
        name = next(known for known in CACHES if known != name)

    def after_prefix() -> Tensor:
        with torch.no_grad():
            prefix = model.base_model(batch[:, :5], use_cache=True)
            return model(batch[:, 5:8], **{name: getattr(prefix, name)}, use_cache=False).logits

    before = after_prefix()
    flexpatch.apply(model)
    assert torch.equal(after_prefix(), before)


@parameterized.expand(
    [
        ("use_cache not given", dict(use_cache=None)),
        ("attention_mask of the caller's own", dict(attention_mask=torch.ones(9, 1, 33, 33, dtype=torch.bool).tril())),
        ("output_attentions=True", dict(output_attentions=True)),
        ("the argument token_type_ids", dict(token_type_ids=torch.zeros(9, 33, dtype=torch.int64))),
        ("position_ids that do not count", dict(position_ids=torch.arange(33).remainder(7).expand(9, 33))),
        ("inputs_embeds", dict(input_ids=None, inputs_embeds=torch.randn(9, 33, TINY["hidden_size"]))),
    ]
)
def test_calls_that_run_as_they_are_with_a_warning(reason: str, changes: dict[str, Any]) -> None:
    ran = Ran(_attn_implementation="eager") if "attentions" in reason else Ran()
    if "attentions" in reason:
        ran.model.set_attn_implementation("eager")
    S = ran.batch["input_ids"].shape[1]

    def cut(name: str, value: Any) -> Any:
        """Made for 33 columns, of which the batch has fewer."""
        if not isinstance(value, Tensor):
            return value
        return value[..., :S, :S] if name == "attention_mask" else value[:, :S]

    with pytest.warns(FlexpatchWarning, match=reason):
        ran(0, **{name: cut(name, value) for name, value in changes.items()})
    saved = flexpatch.savings(ran.model)
    assert saved.batches == 1 and saved.computed == saved.padded == 9 * S
    (given,) = saved.reasons
    assert reason in given and str(saved) == f"0 of 1 batches folded: 1 {given}"


def test_rows_packed_by_the_caller_run_as_they_are_with_a_warning() -> None:
    """Where there is little to share, and where positions do not restart at 0."""
    model = tiny_model("llama", dtype=torch.float32)
    call = dict(
        input_ids=torch.tensor([[3, 4, 5, 3, 4, 6]]), position_ids=torch.tensor([[0, 1, 2] * 2]), use_cache=False
    )
    before = model(**call).logits
    flexpatch.apply(model)
    assert (model(**call).logits - before).abs().max() < 1e-5 and flexpatch.savings(model).batches == 1
    call["position_ids"] += 3  # a document that continues one of an earlier call
    before = flexpatch.remove(copy.deepcopy(model))(**call).logits
    with pytest.warns(FlexpatchWarning, match="position_ids that do not count .*, nor restart at 0"):
        assert torch.equal(model(**call).logits, before)


def test_tuples() -> None:
    """A causal model asks its backbone for a named output even then; a bare backbone returns what it is asked for."""
    Ran()(1, return_dict=False)
    model, batch = tiny_model("llama"), padded_batch()
    before = model.base_model(**batch, return_dict=False)
    with pytest.warns(FlexpatchWarning, match="return_dict=False"):
        after = flexpatch.apply(model).base_model(**batch, return_dict=False)
    assert torch.equal(before[0], after[0])


def test_a_model_with_the_name_and_no_hooks_says_so() -> None:
    """Trainers make references from a patched model's configuration: right, but without sharing."""
    model, batch = flexpatch.apply(tiny_model("llama", dtype=torch.float32)), padded_batch()
    reference = type(model)._from_config(model.config, attn_implementation=model.config._attn_implementation)
    reference.load_state_dict(model.state_dict())
    assert not flexpatch.is_applied(reference)
    with pytest.warns(FlexpatchWarning, match="of a model built from a patched one's settings"):
        logits = reference(**batch).logits
    assert torch.equal(logits, flexpatch.remove(copy.deepcopy(model))(**batch).logits)
    flexpatch.apply(reference)(**batch)
    assert flexpatch.savings(reference).folded == 1
    flexpatch.apply(reference, fold=False)(**batch)  # on purpose, so without a word


def test_given_positions_that_count_columns_fold() -> None:
    ran = Ran()
    S = ran.batch["input_ids"].shape[1]
    ran(1, position_ids=torch.arange(S)[None])
    ran(1, position_ids=(ran.batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    ran(1, position_ids=torch.arange(5, S + 5).expand(9, S))


def test_which_positions_count_columns() -> None:
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    assert follow_columns(np.array([[1, 0, 1, 2], [0, 1, 1, 1], [9, 9, 9, 9]]), mask)
    assert not follow_columns(np.array([[1, 0, 1, 1], [0, 1, 1, 1], [9, 9, 9, 9]]), mask)
    assert follow_columns(np.arange(4)[None] + 3, None)
    assert not follow_columns(np.array([[0, 1, 0, 1]]), None)


@pytest.mark.real_gains
def test_batches_that_gain_nothing_run_as_they_were_given() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(3, 151, (4, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    before = model(ids, mask, use_cache=False).logits
    assert torch.equal(flexpatch.apply(model)(ids, mask, use_cache=False).logits, before)
    assert flexpatch.savings(model) == Savings(batches=1, folded=0, padded=120, computed=120, padding=0, shared=0)
    model(ids[:1].expand(4, 30), mask, use_cache=False)
    assert flexpatch.savings(model, last=1).folded == 1


@pytest.mark.real_gains
def test_the_rule_of_gains() -> None:
    config = AutoConfig.for_model("llama", hidden_size=64)
    for computed, worth in ((900, True), (901, False), (100, True)):
        assert gains(config, Counts(1000, 1000, computed), 100, None) == worth
    # A dense row of 400 tokens computes more pairs than 8 rows of 100 columns; one of 3,200 far too many for 64 rows.
    assert gains(config, Counts(800, 800, 400), 100, torch.bool)
    assert gains(config, Counts(6400, 6400, 3200), 100, None)
    assert not gains(config, Counts(6400, 6400, 3200), 100, torch.bool)


def test_fold_can_be_switched_off_and_on() -> None:
    model, batch = tiny_model("llama", dtype=torch.float32), padded_batch()
    before = model(**batch).logits
    flexpatch.apply(model, fold=False)
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(FlexpatchError, match="does not fold batches"):
        flexpatch.savings(model)
    for _ in range(2):
        flexpatch.apply(model)
        assert len(model.base_model._forward_pre_hooks) == 1 and len(model.base_model._forward_hooks) == 2
    model(**batch)
    assert flexpatch.savings(flexpatch.apply(model)).folded == 1
    flexpatch.apply(model, fold=False)
    assert torch.equal(model(**batch).logits, before)
    flexpatch.remove(flexpatch.apply(model))
    assert torch.equal(model(**batch).logits, before)


@parameterized.expand([(None,), (True,), (False,)])
def test_checking_parity_leaves_folding_as_it_was(fold: bool | None) -> None:
    model = tiny_model("llama")
    options = None if fold is None else dict(backend="dense", fold=fold, compile=True, recompute_layers=1)
    if options:
        flexpatch.apply(model, **options)
    assert flexpatch.check_parity(model).passed
    assert patch.settings_of(model) == (options and options | {"mixers": "auto", "shared_dropout": False})
    assert len(model.base_model._forward_pre_hooks) == (fold is not None)
    assert len(model.base_model._forward_hooks) == 2 * (fold is not None)


def test_hooks_of_others_stay() -> None:
    model, seen = tiny_model("llama"), []
    model.base_model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.base_model.register_forward_hook(lambda module, args, output: seen.append("after"))
    flexpatch.remove(flexpatch.apply(model))(**padded_batch())
    assert seen == ["before", "after"]


def test_copies_fold_by_themselves() -> None:
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected)
        assert flexpatch.savings(other).folded == 2
        flexpatch.remove(other)
    assert flexpatch.savings(model).folded == 1


def test_a_batch_is_folded_once_for_policy_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values are the same batch, in whatever tensors; any other value is another."""
    folds = []
    monkeypatch.setattr("flexpatch.folding.fold_batch", lambda *args: folds.append(1) or fold_batch(*args))
    stock, batch = tiny_model("mistral"), padded_batch()
    model = flexpatch.apply(copy.deepcopy(stock))

    def run(**changed: Any) -> int:
        """Runs a batch, checks it, and says how often it was folded."""
        before, call = len(folds), batch | changed
        real = call["attention_mask"].bool()
        ours, theirs = model(**call).logits, stock(**call).logits
        assert (ours - theirs)[real].abs().max() < BOUND
        return len(folds) - before

    assert run() == 1
    assert run() == 0
    assert run(**{name: x.clone() for name, x in batch.items() if name != "use_cache"}) == 0
    assert flexpatch.savings(model).batches == 3
    batch["input_ids"][0, -1] += 1  # the same tensor, written to
    assert run() == 1
    shorter = batch["attention_mask"].clone()
    shorter[0, shorter[0].sum() - 1] = 0
    assert run(attention_mask=shorter) == 1
    assert run(position_ids=torch.arange(shorter.shape[1]).expand_as(shorter)) == 1
    with torch.inference_mode():
        run()
    run()
    model(**batch).logits.sum().backward()  # of a fold whose tensors autograd may keep
    # What another hook does to a call's ids is over with that call.

    def spoil(module: nn.Module, args: Any, call: dict[str, Any]) -> None:
        call["input_ids"].fill_(5)

    handle = model.base_model.register_forward_pre_hook(spoil, with_kwargs=True)
    model(**batch)
    handle.remove()
    run()


def test_a_refused_batch_counts_for_nothing() -> None:
    model, batch = flexpatch.apply(tiny_model("llama")).train(), padded_batch()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="NEFTune"):
            model(**batch)
    assert flexpatch.savings(model).batches == 0


def test_ids_that_a_smaller_vocabulary_lacks_are_refused_again() -> None:
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    model(**batch)
    model.resize_token_embeddings(int(batch["input_ids"].max()))
    with pytest.raises(FlexpatchError, match="outside the vocabulary"):
        model(**batch)


def test_selective_checkpointing_of_the_whole_model() -> None:
    """It wants the same operations of a forward and its recomputation."""
    model, batch = flexpatch.apply(tiny_model("llama", dtype=torch.float32)).train(), padded_batch()
    expected = torch.autograd.grad(model(**batch).logits.square().sum(), model.lm_head.weight)[0]
    context = partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE)
    logits = checkpoint(lambda: model(**batch).logits, use_reentrant=False, context_fn=context)
    ours = torch.autograd.grad(logits.square().sum(), model.lm_head.weight)[0]
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_compiling_the_whole_model() -> None:
    """The fold stays outside the graphs."""
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    expected = model(**batch).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    real = batch["attention_mask"].bool()
    assert (compiled(**batch).logits - expected)[real].abs().max() < ROUNDED
    assert flexpatch.savings(model).folded == 2


def test_generation_is_untouched() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    prompts = {name: batch[name][:, :5] for name in ("input_ids", "attention_mask")}
    settings = dict(max_new_tokens=8, do_sample=False)
    before = model.generate(**prompts, **settings)
    assert torch.equal(flexpatch.apply(model).generate(**prompts, **settings), before)
    assert flexpatch.savings(model).batches == 0


def test_bad_batches_are_named() -> None:
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    for wrong in (-1, TINY["vocab_size"]):
        ids = batch["input_ids"].clone()
        ids[4, 2] = wrong
        with pytest.raises(
            FlexpatchError,
            match=f"row 4, column 2 of the batch holds id {wrong}, outside the vocabulary of {TINY['vocab_size']}",
        ):
            model(**batch | {"input_ids": ids})
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, TINY["vocab_size"] + 5)
    assert model(**batch | {"input_ids": ids}).logits.isfinite().all()
    with pytest.raises(FlexpatchError, match=r"attention_mask has shape \(9, 3\), but input_ids has \(9, "):
        model(**batch | {"attention_mask": batch["attention_mask"][:, :3]})


def test_a_row_without_tokens() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    batch["attention_mask"][3] = 0
    before = hidden(model, batch)
    assert (hidden(flexpatch.apply(model), batch) - before).abs().max() < BOUND
    batch["attention_mask"][:] = 0
    model(**batch)
    assert fold_batch(batch["input_ids"].numpy(), np.zeros(batch["input_ids"].shape, bool)) is None


def test_refusals() -> None:
    batch = padded_batch()
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
    )
    with pytest.raises(UnsupportedModelError, match=r"dropout 0.1 in .* is active"):
        flexpatch.apply(model)
    model.requires_grad_(False)  # a reference never trains
    flexpatch.apply(model)
    assert model.eval()(**batch).logits.isfinite().all()
    with pytest.raises(UnsupportedModelError, match=r"dropout 0.1 in .* is active"):
        model.train()(**batch)
    model = flexpatch.apply(tiny_model("llama").train())
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    with pytest.raises(UnsupportedModelError, match="NEFTune noise on 'embed_tokens' is active"):
        model(**batch)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[5], target_modules="all-linear")
    model = peft.get_peft_model(flexpatch.apply(tiny_model("llama")), config)
    with pytest.raises(UnsupportedModelError, match=r"peft adapter 'default' .*switches on behind its invocation"):
        model(**batch)


def test_the_report() -> None:
    given = "with output_router_logits=True"
    saved = Savings.of([Counts(100, 80, 50), *[Counts(40, 40, 40, given)] * 2, Counts(20, 20, 20, "with a reason")])
    assert saved == Savings(batches=4, folded=1, padded=200, computed=150, padding=20, shared=30)
    assert saved.reasons == {given: 2, "with a reason": 1}
    assert str(saved) == (
        "1 of 4 batches folded: 150 tokens computed instead of 200, 1.33 times fewer; 10% were padding, "
        "15% shared prefixes; as given: 2 with output_router_logits=True, 1 with a reason"
    )
    assert str(Savings.of([Counts(40, 40, 40, given)] * 20)) == f"0 of 20 batches folded: 20 {given}"
    assert Savings.of([]).factor == 1
    assert str(Savings.of([])) == "0 of 0 batches folded: none has run yet"


@parameterized.expand(["sdpa", "eager", "someone_elses_attention"])
def test_another_implementation_after_apply_runs_unfolded(implementation: str) -> None:
    model, batch = tiny_model("llama"), padded_batch()
    AttentionInterface.register("someone_elses_attention", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("someone_elses_attention", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(implementation)
    before = model(**batch).logits
    model.set_attn_implementation("sdpa")
    flexpatch.apply(model)
    model.set_attn_implementation(implementation)
    with pytest.warns(FlexpatchWarning, match="changed after flexpatch.apply .apply it again"):
        assert torch.equal(model(**batch).logits, before)
    model.set_attn_implementation("sdpa")
    changed = "of a model whose attention implementation was changed after flexpatch.apply"
    assert flexpatch.savings(flexpatch.apply(model)).reasons == {changed: 1}
    flexpatch.remove(model)
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(table)._global_mapping.pop("someone_elses_attention")


def test_a_wrapped_backbone_keeps_its_hooks_in_sight() -> None:
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    expected = model(**batch).logits
    model.model = torch.compile(model.model, backend="eager")
    flexpatch.apply(model)
    assert (model(**batch).logits - expected)[batch["attention_mask"].bool()].abs().max() < ROUNDED
    assert flexpatch.savings(model).folded == 2
    flexpatch.remove(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_noise_and_bidirectional_models_are_refused() -> None:
    batch = padded_batch()
    model = flexpatch.apply(tiny_model("mixtral").train())
    model.model.layers[0].mlp.jitter_noise = 0.1
    with pytest.raises(UnsupportedModelError, match=r"router jitter noise 0.1 in 'layers.0.mlp' is active"):
        model(**batch)
    if "dbrx" in tiny_types():
        model = flexpatch.apply(tiny_model("dbrx").train())
        for name, reason in (("resid_pdrop", "dropout 0.1"), ("moe_jitter_eps", "router jitter noise 0.1")):
            module = next(module for module in model.modules() if name in vars(module))
            rate = vars(module)[name]
            setattr(module, name, 0.1)
            with pytest.raises(UnsupportedModelError, match=f"{reason} in '.*' is active"):
                model(**batch)
            setattr(module, name, rate)
        model.config.attn_config.attn_pdrop = 0.1
        with pytest.raises(UnsupportedModelError, match=r"attn_pdrop=0.1 draws one mask"):
            flexpatch.apply(model)
    model = tiny_model("llama")
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="is_causal=False lets a prompt see its answer"):
        flexpatch.apply(model)
    model = tiny_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UnsupportedModelError, match="device_map puts this model on several devices"):
        flexpatch.apply(model)


def test_longrope_keeps_the_side_of_its_limit() -> None:
    """Frequencies follow the call's largest position, which padding and given positions can raise."""
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[3.0] * 8)
    model = tiny_model("llama")
    settings = model.config.to_dict() | dict(
        max_position_embeddings=128, rope_parameters=rope | dict(original_max_position_embeddings=64, factor=2.0)
    )
    model = type(model)(type(model.config)(**settings)).double().eval()
    batch = padded_batch()
    S = batch["input_ids"].shape[1]
    with _Float64():
        plain = model(**batch).logits
        high = model(**batch, position_ids=torch.arange(40, 40 + S)[None]).logits
        flexpatch.apply(model)
        real = batch["attention_mask"].bool()
        assert (model(**batch).logits - plain)[real].abs().max() < BOUND
        with pytest.warns(FlexpatchWarning, match="longrope switches"):
            assert torch.equal(model(**batch, position_ids=torch.arange(40, 40 + S)[None]).logits, high)
    assert flexpatch.savings(model).folded == 1


def test_masks_and_ids_as_they_come() -> None:
    """A mask counts where it is not zero; narrow ids do not overflow where a hole widens the keys."""
    model, batch = tiny_model("llama", dtype=torch.float32), padded_batch()
    half = batch["attention_mask"] * 0.5
    expected = flexpatch.apply(model)(**batch).logits
    assert torch.equal(model(**batch | {"attention_mask": half}).logits, expected)
    ids, mask = np.array([[5, 6, 7, 8, 9]] * 2, np.int32), np.ones((2, 5), bool)
    mask[1, 1] = False
    folded = fold_batch(ids, mask)
    assert folded is not None
    assert sorted(folded.rows.position_ids[0].tolist()) == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_last_batches() -> None:
    model = flexpatch.apply(tiny_model("llama"))
    with pytest.raises(FlexpatchError, match="last=0; expected at least 1"):
        flexpatch.savings(model, 0)


@parameterized.expand([(None,), (3,)])
def test_a_filled_lookup_is_a_lookup(padding: int | None) -> None:
    """What CUDA runs instead of a short embedding: the same states and gradients, to the bit on a CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, generator=generator).requires_grad_()
    index = torch.randint(7, (4, 6), generator=generator)
    weight = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    results = []
    for looked_up in (lookup(hidden, index, padding), _filled_lookup(hidden, index, padding)):
        results.append((looked_up, torch.autograd.grad((looked_up * weight).sum(), hidden)[0]))
    (states, gradient), (filled_states, filled_gradient) = results
    assert torch.equal(states, filled_states) and torch.equal(gradient, filled_gradient)
    assert padding is None or not gradient[padding].any()
    assert gradient.any(1).sum() == (7 if padding is None else 6)


def test_ids_that_are_no_integers_are_refused() -> None:
    model, batch = flexpatch.apply(tiny_model("llama")), padded_batch()
    for dtype in (torch.float32, torch.float64, torch.int16):
        with pytest.raises(FlexpatchError, match=f"input_ids are {dtype}; token ids are torch.int64 or torch.int32"):
            model(**batch | {"input_ids": batch["input_ids"].to(dtype)})
    expected = hidden(model, batch)
    assert torch.equal(hidden(model, batch | {"input_ids": batch["input_ids"].int()}), expected)


def test_positions_between_integers_run_as_they_are() -> None:
    """Rounded down they would count columns."""
    ran = Ran()
    columns = torch.arange(ran.batch["input_ids"].shape[1]) * 1.04
    with pytest.warns(FlexpatchWarning, match="position_ids that are not integers"):
        ran(0, position_ids=columns.expand(9, -1))


def test_queries_scaled_by_their_position() -> None:
    """Ministral 3: a sequence that folding would move to another position runs as it was given, beyond the length at
    which scaling starts."""
    model = tiny_model("ministral3")
    model.config.rope_parameters |= {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}
    ids = torch.randint(3, 151, (1, 12), generator=torch.Generator().manual_seed(0)).expand(3, 12)
    patched = flexpatch.apply(copy.deepcopy(model))
    for before, after, warned in ((0, 20, SCALES_BY_INDEX), (3, 0, False), (20, 0, True)):
        pads = [torch.zeros(3, n, dtype=torch.int64) for n in (before, after)]
        whole = torch.cat([pads[0], ids, pads[1]], 1)
        mask = (whole > 0).long()
        batch = dict(input_ids=whole, attention_mask=mask, use_cache=False)
        expected = hidden(model, batch)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", FlexpatchWarning)
            assert (hidden(patched, batch) - expected).abs().max() < BOUND
        assert bool(said) == warned
        with pytest.MonkeyPatch.context() as control:
            control.setattr("flexpatch.calls.scaling_limit", lambda config: None)
            error = (hidden(flexpatch.apply(copy.deepcopy(model)), batch) - expected).abs().max()
            assert (error > 1e-3) == (before == 20)
    rows = flexpatch.build_rows([[flexpatch.Tree.of(list(range(3, 40)), [5], [6])]])
    if SCALES_BY_INDEX:
        with pytest.raises(UnsupportedModelError, match=r"rows of more than 16 tokens.* upgrade it to 5\.4 or later"):
            flexpatch.answer_logprobs(patched, rows)
