"""Mixtures of experts fold with their router logits: auxiliary losses and gradients are the unpatched model's."""

import copy
from typing import Any

import pytest
import torch
import transformers
from helpers.completions import SEQUENCES
from helpers.oracle import FIRST
from packaging.version import Version
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch.float64 import Float64
from flexpatch.internals import eager_experts
from flexpatch.models import tiny_config, tiny_model, tiny_types

BOUND = 1e-10
# Some architectures ignore the flag, and some fail with labels and it, unpatched.
OLD = Version(transformers.__version__) < Version("5.17")


def batch(side: str) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(SEQUENCES, batch_first=True, padding_side=side)
    mask = ids != 0
    # A first token would be predicted in front of its sequence, where eager attention averages over all padding.
    later = mask & (mask.cumsum(1) > 1)
    return dict(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~later, -100))


def routes(model_type: str) -> bool:
    config = tiny_config(model_type).get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
    return getattr(config, "is_moe", True) and any(getattr(config, name, None) for name in names)


MIXTURES = [model_type for model_type in tiny_types() if routes(model_type)]


def results(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """A loss with the auxiliary one, and one of the router logits themselves; its gradient in all weights."""
    model.zero_grad()
    output = model(**call, use_cache=False, output_router_logits=True)
    real = call["attention_mask"].bool()
    routers = [logits.view(*real.shape, -1)[real] for logits in output.get("router_logits") or ()]
    assert routers or OLD
    loss = output.loss + sum((r * torch.linspace(-1, 1, r.numel()).to(r).view_as(r)).mean() for r in routers)
    if output.get("aux_loss") is not None:
        loss = loss + output.aux_loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), output


def test_there_are_mixtures() -> None:
    assert {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"} <= set(MIXTURES)


@parameterized.expand([(model_type,) for model_type in MIXTURES if model_type in FIRST])
def test_auxiliary_losses(model_type: str) -> None:
    auxiliary_losses(model_type)


@parameterized.expand([(model_type,) for model_type in MIXTURES if model_type not in FIRST])
@pytest.mark.slow
def test_auxiliary_losses_of_all(model_type: str) -> None:
    auxiliary_losses(model_type)


def auxiliary_losses(model_type: str) -> None:
    stock = eager_experts(tiny_model(model_type)).train()
    if OLD:
        try:
            results(stock, batch("left"))
        except AttributeError as error:
            pytest.skip(f"transformers {transformers.__version__}: {model_type} fails unpatched: {error}")
    model = flexpatch.apply(copy.deepcopy(stock))
    for side in ("right", "left"):
        with Float64():
            (true, slope, output), (ours, our_slope, our_output) = (results(m, batch(side)) for m in (stock, model))
        routers, our_routers = (each.get("router_logits") or () for each in (output, our_output))
        assert [r.shape for r in our_routers] == [r.shape for r in routers]
        assert (ours - true).abs() < BOUND and (our_slope - slope).norm() < BOUND * slope.norm()
    saved = flexpatch.savings(model)
    # Some models see padding in front of a sequence, or count it.
    assert saved.folded + sum(n for why, n in saved.reasons.items() if why.startswith("with padding")) == 2
    assert saved.folded >= 1


def test_asked_for_by_the_configuration() -> None:
    stock = eager_experts(tiny_model("mixtral")).train()
    stock.config.output_router_logits = True
    model = flexpatch.apply(copy.deepcopy(stock))
    call = batch("right") | {"use_cache": False}
    (true, ours) = (m(**call) for m in (stock, model))
    assert true.aux_loss is not None and (ours.aux_loss - true.aux_loss).abs() < 1e-6
    assert (ours.loss - true.loss).abs() < 1e-6 and flexpatch.savings(model).folded == 1


@parameterized.expand(["wrong order", "left folded"])
def test_the_comparison_can_fail(broken: str) -> None:
    stock = eager_experts(tiny_model("mixtral"))
    model = flexpatch.apply(copy.deepcopy(stock))
    true, slope, _ = results(stock, batch("right"))

    def change(output: Any, unfold: Any) -> None:
        output.last_hidden_state = unfold(output.last_hidden_state)
        shape = (1, len(output.router_logits[0]), -1)
        unfolded = [unfold(r.view(shape)) for r in output.router_logits]
        output.router_logits = tuple(
            (r.transpose(0, 1) if broken == "wrong order" else r[:, :1].expand_as(r)).flatten(0, 1) for r in unfolded
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.folding.change_tokens", change)
        ours, our_slope, _ = results(model, batch("right"))
    assert (ours - true).abs() > 1e-4 and (our_slope - slope).norm() > 1e-4 * slope.norm()


def test_under_checkpointing() -> None:
    stock = eager_experts(tiny_model("qwen3_moe")).train()
    stock.gradient_checkpointing_enable({"use_reentrant": False})
    model = flexpatch.apply(copy.deepcopy(stock), recompute_layers=2)
    (true, slope, _), (ours, our_slope, _) = (results(m, batch("left")) for m in (stock, model))
    assert (ours - true).abs() < 1e-6 and (our_slope - slope).norm() < 1e-5 * slope.norm()
    assert flexpatch.savings(model).folded == 1


@parameterized.expand([(0, False), (None, True), (99, True), ("partly", True)])
def test_under_reentrant_checkpointing(setting: Any, lost: bool) -> None:
    """Router logits of recomputed layers have no gradient then, in the unpatched model either."""
    stock = eager_experts(tiny_model("qwen3_moe")).train()
    model = flexpatch.apply(copy.deepcopy(stock), recompute_layers=setting)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    full = results(stock, batch("left"))[1]
    stock.gradient_checkpointing_enable({"use_reentrant": True})
    slope = results(stock, batch("left"))[1] if lost else full
    assert (slope - full).norm() > 0.1 * full.norm() if lost else True
    assert (results(model, batch("left"))[1] - slope).norm() < 1e-5 * slope.norm()


@parameterized.expand([(1,), (3,), ("auto",)])
def test_routers_that_reentrant_checkpointing_would_part_are_refused(setting: Any) -> None:
    """Those of layers that are kept would have gradients, and no others: by free memory, with "auto"."""
    model = flexpatch.apply(eager_experts(tiny_model("qwen3_moe")).train(), recompute_layers=setting)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(flexpatch.UnsupportedModelError, match="router logits get no gradient in layers"):
        results(model, batch("left"))
    if setting != "auto":  # it measures a GPU
        assert model(**batch("left"), use_cache=False).loss.requires_grad
        model.gradient_checkpointing_enable({"use_reentrant": False})
        results(model, batch("left"))


def test_layers_that_gather_their_weights_are_never_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 has "auto" recompute all layers: routers lose the gradients that they lose unpatched."""
    stock = eager_experts(tiny_model("qwen3_moe")).train()
    model = flexpatch.apply(copy.deepcopy(stock), recompute_layers="auto")
    monkeypatch.setattr("flexpatch.checkpointing._gathers", lambda layers: True)
    for each in (stock, model):
        each.gradient_checkpointing_enable({"use_reentrant": True})
    slope = results(stock, batch("left"))[1]
    with pytest.warns(flexpatch.FlexpatchWarning, match="under ZeRO-3 recompute_layers='auto' recomputes all layers"):
        assert (results(model, batch("left"))[1] - slope).norm() < 1e-5 * slope.norm()
