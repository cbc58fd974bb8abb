"""How much is recomputed in backward: counted, with the same gradients whatever it is."""

import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from helpers.oracle import deep
from parameterized import parameterized
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import flexpatch
from flexpatch.checkpointing import USABLE, Recomputation
from flexpatch.internals import layers_of
from flexpatch.meters import Memory, cuda_memory, kind_of
from flexpatch.models import tiny_model, tiny_types
from flexpatch.segments import NO_LOAD, Load

LAYERS = 5


class Device:
    """A device whose memory a test decides, in units of a layer's activations for one token."""

    def __init__(self, limit: float) -> None:
        self.limit, self.allocated, self.held = limit, 100, 100

    def __call__(self, device: torch.device) -> Memory:
        return Memory(self.allocated, self.held, int(self.limit))


class Layer(nn.Module):
    """Allocates ``size`` a token in forward: 2 when recomputed, else ``kept``."""

    def __init__(self, device: Device, kept: int = 10) -> None:
        super().__init__()
        self.device, self.kept, self.size = device, kept, 0

    def forward(self, ids: torch.Tensor) -> None:
        self.device.allocated += self.size * ids.numel()


class State(Layer):
    """A layer of another kind."""


def which(policy: Recomputation, device: Device, model: nn.Module, tokens: int, load: Load = NO_LOAD) -> list[int]:
    """One training forward and backward; the layers that it recomputes."""
    ids = torch.zeros(1, tokens)
    (kept, *_), measured = policy.plan(list(model), ids, model, load)
    before = device.allocated
    for layer in model:
        layer.size = layer.kept if layer in kept else 2
        layer(ids)
    device.held = max(device.held, device.allocated)
    if measured is not None:
        measured(True)
    device.allocated = before
    return [i for i, layer in enumerate(model) if layer not in kept]


def test_rows_with_more_states_keep_fewer_layers() -> None:
    """The most that a layer can keep for a row is in proportion to its states, or separate tokens, a token."""

    def kept(load: Load) -> int:
        device = Device(1e4)
        model = nn.ModuleList([Layer(device) for _ in range(LAYERS)])
        model.weight = nn.Parameter(torch.zeros(1))
        policy = Recomputation("auto", device)
        for _ in range(2):
            which(policy, device, model, 10, Load(1.5, 0.1))
        device.limit = (device.held + LAYERS * 80 + 10) / USABLE
        with torch.no_grad():
            model.weight += 1
        return LAYERS - len(which(policy, device, model, 10, load))

    assert kept(Load(1.5, 0.1)) == kept(NO_LOAD) == LAYERS
    assert kept(Load(3.0, 0.1)) == kept(Load(1.0, 0.2)) == LAYERS // 2
    assert kept(Load(1.0, 1e9)) == 0


def forward(policy: Recomputation, device: Device, model: nn.Module, tokens: int) -> int:
    """How many layers a training forward and backward recomputes."""
    return len(which(policy, device, model, tokens))


def stepped_policy(limit: float) -> tuple[Recomputation, Device, nn.Module]:
    """After two forwards of 10 tokens and an optimizer step that allocates 50: held are 280, with
    one layer kept to measure it."""
    device = Device(limit)
    model = nn.ModuleList([Layer(device) for _ in range(LAYERS)])
    model.weight = nn.Parameter(torch.zeros(1))
    policy = Recomputation("auto", device)
    assert forward(policy, device, model, 10) == LAYERS - 1, "one layer is measured"
    assert forward(policy, device, model, 10) == LAYERS
    device.allocated += 50
    device.held = max(device.held, device.allocated + 50)
    model.weight.data += 1
    return policy, device, model


@parameterized.expand([(280, 0), (355, 0), (365, 1), (435, 1), (445, 2), (685, 5), (10_000, 5)])
def test_as_many_layers_are_kept_as_fit(usable: int, kept: int) -> None:
    """A layer keeps 8 a token more than when checkpointed: 80 for 10 tokens, above the peak of 280."""
    policy, device, model = stepped_policy(limit=usable / 0.9 + 1)
    assert device.held == 280
    assert forward(policy, device, model, 10) == LAYERS - kept
    assert list(policy.sizes.of["everything"].values()) == [8]


def step(device: Device, model: nn.Module) -> None:
    """An optimizer's."""
    device.allocated, device.held = 150, 2000
    model.weight.data += 1


# A state keeps 40 a token more than when checkpointed, an attention 8: for 10 tokens 400 and 80.
@parameterized.expand(
    [
        (395, "SASAS", 0), (405, "SASAS", 1), (475, "SASAS", 1), (485, "SASAS", 2), (885, "SASAS", 3),
        (75, "SSSSA", 0), (475, "SSSSA", 1), (485, "SSSSA", 2), (1285, "SSSSA", 4),
        (475, "SA", 1), (485, "SA", 2), (395, "AS", 0), (485, "AS", 2),
    ]
)  # fmt: skip
def test_layers_of_several_kinds(room: int, pattern: str, kept: int) -> None:
    """Each is counted by what its own kind keeps, wherever the layers of that kind are."""
    device = Device((2000 + room) / 0.9 + 1)
    model = nn.ModuleList([State(device, 42) if kind == "S" else Layer(device) for kind in pattern])
    model.weight = nn.Parameter(torch.zeros(1))
    policy = Recomputation("auto", device)
    every = list(range(len(pattern)))
    measured = []
    for _ in range(2):  # a step each
        (left,) = set(every) - set(which(policy, device, model, 10))
        measured.append(left)
        step(device, model)
    assert sorted(measured) == sorted([pattern.rindex("S"), pattern.rindex("A")]), "the last layer of each kind"
    assert which(policy, device, model, 10) == every[: len(every) - kept]
    assert sorted(policy.sizes.of["everything"].values()) == [8, 40]


def test_kinds_that_come_later_count_as_the_largest() -> None:
    policy, device, model = stepped_policy(limit=10_000)
    assert forward(policy, device, model, 10) == 0
    device.limit = (280 + 245) / 0.9 + 1
    assert forward(policy, device, model, 10) == LAYERS - 3
    model[-1] = State(device)
    assert forward(policy, device, model, 10) == LAYERS - 3


KINDS = dict(llama=1, gpt_oss=1, qwen3_5_text=2, bamba=2, nemotron_h=4, lfm2=2)


@parameterized.expand([(kind, KINDS[kind]) for kind in KINDS if kind in tiny_types()])
def test_kinds_of_layers(kind: str, kinds: int) -> None:
    """Layers of a hybrid differ; layers with other masks alone do not."""
    model = deep(kind, LAYERS) if kind == "llama" else tiny_model(kind)
    layers = layers_of(model.model)
    assert len(layers) > 1 and len({kind_of(layer) for layer in layers}) == kinds


def test_kinds_of_trained_layers() -> None:
    first, *_, last = layers_of(deep("llama", 2).model)
    assert kind_of(first) == kind_of(last)
    first.requires_grad_(False)
    assert kind_of(first) != kind_of(last)


def test_longer_rows_keep_less() -> None:
    policy, device, model = stepped_policy(limit=700 / 0.9)
    counts = [forward(policy, device, model, tokens) for tokens in (5, 10, 15, 20, 30, 300)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == LAYERS


def test_forwards_still_to_be_differentiated_count() -> None:
    policy, device, model = stepped_policy(limit=685 / 0.9 + 1)
    assert forward(policy, device, model, 10) == 0
    device.allocated += 160
    assert forward(policy, device, model, 10) == 2


@parameterized.expand([(-1,), ("all",), (True,), (1.5,)])
def test_bad_settings(setting: Any) -> None:
    with pytest.raises(flexpatch.FlexpatchError, match=re.escape(f"recompute_layers={setting!r}; expected")):
        flexpatch.apply(tiny_model("llama"), recompute_layers=setting)


def test_auto_needs_a_device_that_can_be_measured() -> None:
    with pytest.raises(flexpatch.FlexpatchError, match="a CUDA device, and this model is on cpu"):
        cuda_memory(torch.device("cpu"))
    model = flexpatch.apply(tiny_model("llama"), recompute_layers="auto").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(flexpatch.FlexpatchError, match="recompute_layers=8"):
        model(**batch(), use_cache=False)


def test_ranks_that_gather_weights_together_decide_nothing_by_themselves() -> None:
    """ZeRO-3: unequal numbers of layers would have ranks wait for each other forever."""
    policy, device, model = stepped_policy(limit=10_000)
    assert forward(policy, device, model, 10) == 0
    model[0].weight = nn.Parameter(torch.zeros(1))
    model[0].weight.ds_id = 0  # as DeepSpeed marks them
    with pytest.warns(flexpatch.FlexpatchWarning, match="under ZeRO-3 recompute_layers='auto' recomputes all layers"):
        assert forward(policy, device, model, 10) == LAYERS
    assert forward(Recomputation(2), device, model, 10) == 2


def test_what_hooks_take_is_not_measured() -> None:
    """Layers whose activations go to the host seem to keep nothing; if all did, the host would have to hold them."""
    policy, device, model = stepped_policy(limit=10_000)
    with saved_tensors_hooks(torch.clone, torch.clone):
        with pytest.warns(flexpatch.FlexpatchWarning, match="activation_offloading, recompute_layers='auto'"):
            assert forward(policy, device, model, 10) == LAYERS
        assert forward(Recomputation(2), device, model, 10) == 2
    assert forward(policy, device, model, 10) == 0


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 150, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[1, :30] = ids[0, :30]
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def recomputed(model: nn.Module, rows: bool) -> tuple[list[int], torch.Tensor]:
    """Which layers run twice in a step, and the step's gradient."""
    runs: Counter[int] = Counter()
    layers = model.model.layers
    handles = [
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: runs.update([i])) for i, layer in enumerate(layers)
    ]
    model.zero_grad()
    if rows:
        trees = [flexpatch.Tree.of(list(range(3, 40)), [5, 6], [7, 8, 9])]
        flexpatch.answer_logprobs(model, flexpatch.build_rows([trees])).answers.sum().backward()
    else:
        model(**batch(), use_cache=False).logits.square().mean().backward()
    for handle in handles:
        handle.remove()
    return [i for i in range(len(layers)) if runs[i] == 2], torch.cat([p.grad.flatten() for p in model.parameters()])


@parameterized.expand([(n, rows) for n in (0, 2, LAYERS, 99) for rows in (True, False)])
def test_the_first_layers_are_computed_again(count: int, rows: bool) -> None:
    model = flexpatch.apply(deep("llama", LAYERS)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    every, expected = recomputed(model, rows)
    assert every == list(range(LAYERS))
    flexpatch.apply(model, recompute_layers=count)
    some, gradient = recomputed(model, rows)
    assert some == list(range(min(count, LAYERS)))
    assert (gradient - expected).norm() < 1e-15 * expected.norm()
    assert all(layer.gradient_checkpointing for layer in model.model.layers), "the model's own setting comes back"


@parameterized.expand([(RuntimeError,), (KeyboardInterrupt,)])
def test_a_failed_forward_leaves_nothing_behind(kind: type[BaseException]) -> None:
    """Out of memory, say: the model's own setting comes back, at once or by the next call."""
    model = flexpatch.apply(deep("llama", LAYERS), recompute_layers=2).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def fail(*_: Any) -> None:
        raise kind

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(kind):
        recomputed(model, True)
    handle.remove()
    if kind is RuntimeError:
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for layer in model.model.layers:
        layer.input_layernorm._forward_hooks.clear()
    assert recomputed(model, True)[0] == [0, 1]
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_failed_measurement_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.forward.Recomputation", partial(Recomputation, memory=Device(1e9)))
    model = flexpatch.apply(deep("llama", LAYERS), recompute_layers="auto").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = model.model.layers[-1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recomputed(model, True)
    handle.remove()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    for layer in model.model.layers:
        layer.input_layernorm._forward_hooks.clear()
    assert recomputed(model, True)[0] == list(range(LAYERS - 1)), "measured now"


def test_layers_that_were_replaced_are_not_silently_ignored() -> None:
    model = flexpatch.apply(deep("llama", 2), recompute_layers=1).train()
    model.model.layers = nn.ModuleList(_Wrapped(layer) for layer in model.model.layers)
    with pytest.warns(flexpatch.FlexpatchWarning, match="recompute_layers has no effect"):
        model(**batch(), use_cache=False)


class _Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.attention_type = layer, getattr(layer, "attention_type", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def test_a_model_that_does_not_checkpoint_is_left_alone() -> None:
    model = flexpatch.apply(deep("llama", LAYERS), recompute_layers=3).train()
    assert recomputed(model, True)[0] == []
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_auto_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a device on which nothing seems to cost memory but what this test says."""
    device = Device(1e9)
    monkeypatch.setattr("flexpatch.forward.Recomputation", partial(Recomputation, memory=device))
    model = flexpatch.apply(deep("llama", LAYERS), recompute_layers="auto").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-10, fused=True)
    every, expected = recomputed(model, True)
    assert every == list(range(LAYERS - 1))
    assert recomputed(model, True)[0] == list(range(LAYERS)), "no optimizer step yet"
    optimizer.step()
    some, gradient = recomputed(model, True)
    assert some == []
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
