"""Calls in any order: a model that is patched and unpatched along the way, against a twin that never was.

Both go through the same steps, with the same seeds and optimizer. Whatever a step returns has to agree, and so have the
weights in the end. tests/test_fuzz.py says how to run many sequences; a thousand of them are in the long profile.
"""

import copy
import pickle
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.fuzzing import fuzz
from helpers.oracle import see_siblings
from hypothesis import strategies as st
from parameterized import parameterized
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import flexpatch
from flexpatch import fold, folding
from flexpatch.float64 import Float64 as _Float64
from flexpatch.models import tiny_model
from flexpatch.patch import settings_of

# Full attention, windows in all layers, windows in some.
KINDS = [("llama", 0), ("mistral", 1), ("gemma3_text", 0), ("qwen3", 1)]
# In float64 throughout; after checkpointing, whose recomputation leaves that mode; and in float32.
EXACT, ROUNDED, SINGLE = 1e-9, 1e-5, 5e-3


class Twins:
    """A model that was never patched, and its twin."""

    def __init__(self, kind: tuple[str, int]) -> None:
        self.stock, self.ours = (tiny_model(*kind) for _ in range(2))
        self.bound = EXACT
        self.checkpoints = False

    @property
    def adapted(self) -> bool:
        return isinstance(self.stock, peft.PeftModel)

    @property
    def vocabulary(self) -> int:
        return self.stock.get_input_embeddings().weight.shape[0]

    @property
    def single(self) -> bool:
        return self.stock.get_input_embeddings().weight.dtype == torch.float32

    def each(self, act: Callable[[Any], Any]) -> None:
        """Let both do the same, and compare what comes of it: tensors, or the kind of error."""
        results = []
        for model in (self.stock, self.ours):
            torch.manual_seed(0)
            with nullcontext() if self.single or self.checkpoints else _Float64():
                try:
                    results.append(act(model))
                except Exception as error:
                    results.append(error)
        agree(*results, SINGLE if self.single else self.bound)

    def replace(self, make: Callable[[Any], Any]) -> None:
        for name in ("stock", "ours"):
            torch.manual_seed(0)
            setattr(self, name, make(getattr(self, name)))


def agree(one: Any, other: Any, bound: float) -> None:
    if isinstance(one, Exception) or isinstance(other, Exception):
        assert type(one) is type(other), f"the twin: {one!r:.300}; the patched model: {other!r:.300}"
    elif isinstance(one, Tensor):
        assert one.shape == other.shape
        assert one.equal(other) or (one - other).abs().max() <= bound * max(1.0, float(one.abs().max())), (
            f"{(one - other).abs().max():.1e} apart"
        )
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            agree(a, b, bound)
    else:
        assert one == other


# Steps: each takes the twins, and draws whatever else it needs.
STEPS: dict[str, Callable[[Twins, np.random.Generator], None]] = {}


def step(function: Callable[[Twins, np.random.Generator], None]) -> Callable[[Twins, np.random.Generator], None]:
    STEPS[function.__name__] = function
    return function


def batch(rng: np.random.Generator, vocabulary: int) -> dict[str, Tensor]:
    """Prompts with several answers each, padded on a side, some with holes, under a mask of any kind."""
    sequences = []
    for _ in range(rng.integers(1, 3)):
        prompt = rng.integers(3, vocabulary, rng.integers(1, 25))
        sequences += [
            np.concatenate([prompt, rng.integers(3, vocabulary, rng.integers(1, 9))]) for _ in range(rng.integers(1, 4))
        ]
    S = max(map(len, sequences)) + int(rng.integers(0, 3))
    ids, mask = np.zeros((len(sequences), S), np.int64), np.zeros((len(sequences), S), np.int64)
    left = rng.random() < 0.5
    for row, sequence in enumerate(sequences):
        where = slice(S - len(sequence), S) if left else slice(len(sequence))
        ids[row, where], mask[row, where] = sequence, 1
    if rng.random() < 0.2:
        mask &= rng.random(mask.shape) > 0.1
        mask[:, -1 if left else 0] = 1
    call = dict(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    if rng.random() < 0.3:
        call["position_ids"] = (call["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if rng.random() < 0.3:
        call["attention_mask"] = call["attention_mask"].to((torch.bool, torch.int32, torch.float32)[rng.integers(3)])
    return call


def read(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of all tokens, and of whatever else has one behind it: padding on the left, and holes."""
    tokens = mask != 0
    predicts = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
    return logits[tokens | predicts]


@step
def apply(twins: Twins, rng: np.random.Generator) -> None:
    flexpatch.apply(
        twins.ours,
        backend=("auto", "dense")[rng.integers(2)],
        fold=rng.random() < 0.85,
        recompute_layers=(None, None, 0, 1, 9)[rng.integers(5)],
    )


@step
def remove(twins: Twins, rng: np.random.Generator) -> None:
    flexpatch.remove(twins.ours)
    assert not flexpatch.is_applied(twins.ours)


@step
def train_or_eval(twins: Twins, rng: np.random.Generator) -> None:
    mode = bool(rng.integers(2))
    twins.each(lambda model: model.train(mode) and None)


@step
def forward(twins: Twins, rng: np.random.Generator) -> None:
    """With a cache or without, as the caller says or as the model is set; a cache goes on to be used."""
    call = batch(rng, twins.vocabulary)
    more = ({"use_cache": False}, {"use_cache": True}, {}, {})[rng.integers(4)]
    gradients = bool(rng.integers(2))
    last = torch.from_numpy(rng.integers(3, twins.vocabulary, (len(call["input_ids"]), 2)))
    settings = settings_of(twins.ours)
    # Said in a warning: a patched model in training gives no cache that was not asked for, whatever the batch.
    # Its mode is the backbone's: peft wraps a model in eval mode in a module that is in training mode.
    backbone = next(module for module in twins.ours.modules() if isinstance(module, PreTrainedModel)).base_model
    dropped = gradients and backbone.training and more == {} and settings is not None and settings["fold"]

    def act(model: Any) -> Any:
        with torch.set_grad_enabled(gradients):
            out = model(**call, **more)
            found = [read(out.logits.detach(), call["attention_mask"])]
            if dropped:
                assert model is twins.stock or out.past_key_values is None
                return found
            if out.past_key_values is not None:
                mask = torch.cat([call["attention_mask"] != 0, torch.ones_like(last).bool()], 1)
                extra = dict(input_ids=last, attention_mask=mask, past_key_values=out.past_key_values)
                found.append(model(**extra, use_cache=True).logits.detach())
            return found

    twins.each(act)


@step
def train(twins: Twins, rng: np.random.Generator) -> None:
    """A step of a preference loss: losses, gradients and weights."""
    call = batch(rng, twins.vocabulary)
    signs = torch.from_numpy(rng.normal(size=len(call["input_ids"])))
    more = ({"use_cache": False}, {})[rng.integers(2)]
    parts = int(rng.integers(1, 3))
    ids, tokens = call["input_ids"], call["attention_mask"] != 0
    scored = tokens[:, 1:]  # whatever predicts them, holes and padding included

    def act(model: Any) -> Any:
        mode = model.training
        parameters = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.02)
        losses = []
        for _ in range(parts):
            logps = model(**call, **more).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            loss = ((logps * scored).sum(1) * signs.to(logps)).sum() / 100
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        changes = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in parameters]
        optimizer.step()
        model.zero_grad()
        model.train(mode)
        return losses, norm.detach(), changes

    twins.each(act)


@step
def generate(twins: Twins, rng: np.random.Generator) -> None:
    call = batch(rng, twins.vocabulary)
    settings = ({}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False})[rng.integers(4)]
    if settings == {"use_cache": False} and not call["attention_mask"][:, -1].all():
        settings = {}  # it would read padding that nothing follows, for which transformers itself asks not to be used

    def act(model: Any) -> Any:
        given = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0} | settings
        call_ = {key: value for key, value in call.items() if key != "position_ids"}
        return model.generate(**call_, **given, return_dict_in_generate=True, output_logits=True).logits

    twins.each(act)


@step
def checkpointing(twins: Twins, rng: np.random.Generator) -> None:
    if rng.random() < 0.4:
        twins.each(lambda model: model.gradient_checkpointing_disable())
        twins.checkpoints = False
        return
    reentrant = bool(rng.random() < 0.3)

    def act(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    twins.each(act)
    twins.checkpoints, twins.bound = True, ROUNDED


@step
def save_and_load(twins: Twins, rng: np.random.Generator) -> None:
    if twins.adapted:
        return

    def again(model: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            # Ropes too: transformers loads their frequencies in float32, whatever the weights are.
            return AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.dtype)

    twins.replace(again)
    twins.checkpoints = False
    assert not flexpatch.is_applied(twins.ours)


@step
def duplicate(twins: Twins, rng: np.random.Generator) -> None:
    if rng.random() < 0.5 and not twins.checkpoints:
        twins.replace(lambda model: pickle.loads(pickle.dumps(model)))
    else:
        twins.replace(copy.deepcopy)


@step
def resize(twins: Twins, rng: np.random.Generator) -> None:
    size = int(rng.integers(100, 180))
    twins.each(lambda model: model.resize_token_embeddings(size) and None)


@step
def adapters(twins: Twins, rng: np.random.Generator) -> None:
    """LoRA is added, another one, one is chosen, all are off for a call, one is deleted, or they are merged."""
    settings: dict[str, Any] = dict(init_lora_weights=False, r=2)
    settings["target_modules"] = (["q_proj"], ["v_proj", "o_proj"], ["k_proj", "down_proj"])[rng.integers(3)]
    if not twins.adapted:
        settings["task_type"] = "CAUSAL_LM"
        twins.replace(lambda model: peft.get_peft_model(model, peft.LoraConfig(**settings)))
        return
    names = list(twins.stock.peft_config)
    what, name = rng.integers(5), names[rng.integers(len(names))]
    if what == 0 and len(names) < 3:
        twins.each(lambda model: model.add_adapter(f"adapter {len(names)}", peft.LoraConfig(**settings)))
    elif what == 1:
        twins.each(lambda model: model.set_adapter(name))
    elif what == 2 and len(names) > 1:
        twins.each(lambda model: model.delete_adapter(name))
    elif what == 3:
        twins.replace(lambda model: model.merge_and_unload())
        twins.each(lambda model: model.requires_grad_(True) and None)
    else:
        call = batch(rng, twins.vocabulary)

        def act(model: Any) -> Any:
            with model.disable_adapter():
                return read(model(**call, use_cache=False).logits.detach(), call["attention_mask"])

        twins.each(act)


@step
def change_dtype(twins: Twins, rng: np.random.Generator) -> None:
    dtype = (torch.float32, torch.float64)[rng.integers(2)]
    if dtype == torch.float32:
        twins.bound = SINGLE  # also of what float64 makes of those weights afterwards
    twins.replace(lambda model: model.to(dtype))


@step
def freeze(twins: Twins, rng: np.random.Generator) -> None:
    layer = f"layers.{rng.integers(4)}."
    on = bool(rng.integers(2))

    def act(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if layer in name and ("lora_" in name) == twins.adapted:
                parameter.requires_grad_(on)

    twins.each(act)


@step
def set_cache(twins: Twins, rng: np.random.Generator) -> None:
    """As trainers set it."""
    use = bool(rng.integers(2))

    def act(model: Any) -> None:
        model.config.use_cache = use

    twins.each(act)


# Those that show whether anything is wrong come more often, and more of them while the model is patched.
NAMES = [*STEPS, *["apply"] * 5, *["forward"] * 4, *["train"] * 5]


def go(twins: Twins, sequence: list[tuple[str, int]]) -> None:
    for name, seed in sequence:
        STEPS[name](twins, np.random.default_rng(seed))
    weights = [[p.detach() for p in model.parameters()] for model in (twins.stock, twins.ours)]
    agree(*weights, SINGLE if twins.single else twins.bound)


@fuzz(
    20,
    long=1000,
    both=False,
    kind=st.sampled_from(KINDS),
    sequence=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 10**6)), min_size=4, max_size=10),
)
@pytest.mark.filterwarnings("ignore")
def test_sequences(kind: tuple[str, int], sequence: list[tuple[str, int]]) -> bool:
    go(Twins(kind), [("apply", 0), *sequence, ("forward", 1), ("train", 2)])
    return True


@parameterized.expand([(each,) for each in STEPS])
@pytest.mark.filterwarnings("ignore")
def test_batches_fold_after_every_step(name: str) -> None:
    """So the sequences above mean something."""
    twins = Twins(KINDS[0])
    go(twins, [("apply", 0), (name, 0), (name, 1), ("apply", 0), ("train", 2), ("train", 3)])
    assert flexpatch.savings(twins.ours).folded > 0


def siblings_seen(bins: Any) -> Any:
    return see_siblings(BUILD_ROWS(bins))


def slightly_off(*args: Any) -> Tensor:
    return UNFOLD(*args) * (1 + 1e-5)


BUILD_ROWS, UNFOLD = fold.build_rows, fold.unfold


@pytest.mark.parametrize(
    ("place", "name", "change"),
    [
        (fold, "build_rows", siblings_seen),
        (folding, "unfold", slightly_off),
        (flexpatch, "remove", lambda model: model),
    ],
)
def test_the_property_can_fail(place: Any, name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, name, change)
    assert not test_sequences.holds()
