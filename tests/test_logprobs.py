"""Log-probs in chunks, against the whole table of logits."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from helpers.oracle import BOUNDS, Result, oracle, separate, trees
from helpers.processes import PROGRAMS, start_python, torchrun
from parameterized import parameterized
from torch import Tensor, nn
from transformers import AutoModel

import flexpatch
from flexpatch import logprobs
from flexpatch.logprobs import sum_answers, token_logprobs
from flexpatch.models import tiny_model
from flexpatch.registry import UNCHANGED, LogitTransform

T, D, V = 23, 16, 101
FORMS = {
    "plain": UNCHANGED,
    "scale": LogitTransform(scale=0.25),
    "cap": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=2.0, softcap=5.0),
}
HEADS = ("frozen", "trained", "bias", "lora", "embedding trained")


def head_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=kind == "bias", dtype=torch.float64).requires_grad_(kind in ("trained", "bias"))
    if kind != "lora":
        return head
    wrapped = peft.get_peft_model(nn.Sequential(head), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    return wrapped.double().base_model.model[0]


def whole(head: nn.Module, hidden: Tensor, targets: Tensor, form: LogitTransform) -> Tensor:
    logits = form.scale * head(hidden)
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return logits.log_softmax(-1)[torch.arange(T), targets]


def results(head: nn.Module, logps: Any) -> list[Tensor]:
    """Log-probs, and gradients of an uneven sum of them."""
    hidden = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.arange(T) * 4 % V
    tokens = logps(head, hidden, targets)
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return [tokens, *torch.autograd.grad((tokens * torch.linspace(-1, 2, T, dtype=torch.float64)).sum(), trained)]


@parameterized.expand([(kind, form, size) for kind in HEADS for form in FORMS for size in (1, 7, T, None)])
def test_chunks_are_exact(kind: str, form: str, size: int | None) -> None:
    head = head_of(kind)
    ours = results(head, lambda *given: token_logprobs(*given, transform=FORMS[form], chunk_tokens=size))
    true = results(head, lambda *given: whole(*given, FORMS[form]))
    wrong = results(
        head, lambda *given: token_logprobs(*given, transform=LogitTransform(softcap=2.0), chunk_tokens=size)
    )
    for a, b, c in zip(ours, true, wrong, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert (c - b).abs().max() > 1e-3


SIZES = [(kind, size) for kind in ("frozen", "trained") for size in (7, None)]


@parameterized.expand(SIZES)
def test_compiled(kind: str, size: int | None) -> None:
    """Through Dynamo and autograd; the slow test adds Inductor's code."""
    compile_ = partial(torch.compile, backend="aot_eager")
    logprobs._compiled.cache_clear()
    with mock.patch.object(torch, "compile", compile_):
        compiled(kind, size)
    logprobs._compiled.cache_clear()


@parameterized.expand(SIZES)
@pytest.mark.slow
def test_compiled_by_inductor(kind: str, size: int | None) -> None:
    compiled(kind, size)


def compiled(kind: str, size: int | None) -> None:
    head = head_of(kind)
    form = FORMS["both"]
    ours = results(head, lambda *given: token_logprobs(*given, transform=form, chunk_tokens=size, compiled=True))
    for a, b in zip(ours, results(head, lambda *given: whole(*given, form)), strict=True):
        assert (a - b).abs().max() < 1e-12


@parameterized.expand([("frozen", 4), ("trained", 8)])
def test_one_chunk_at_a_time(kind: str, calls: int) -> None:
    """A frozen head is called once a chunk, a trained one again in backward; neither ever sees more than a chunk."""
    head, sizes = head_of(kind), []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    results(head, lambda *given: token_logprobs(*given, chunk_tokens=7))
    assert max(sizes) == 7 and len(sizes) == calls


def test_without_gradients() -> None:
    head, hidden, targets = head_of("trained"), torch.randn(T, D, dtype=torch.float64), torch.arange(T)
    with torch.no_grad():
        tokens = token_logprobs(head, hidden, targets, chunk_tokens=5)
    assert not tokens.requires_grad
    assert (tokens - whole(head, hidden, targets, UNCHANGED)).abs().max() < 1e-12


@parameterized.expand([("frozen",), ("trained",)])
def test_gradients_of_torch_func(kind: str) -> None:
    """It takes neither a function that keeps its gradient from forward nor a checkpoint."""
    head, hidden, targets = head_of(kind), torch.randn(T, D, dtype=torch.float64), torch.arange(T)

    def gradient(logps: Any) -> Tensor:
        return torch.func.grad(lambda hidden: logps(head, hidden, targets).square().mean())(hidden)

    true = gradient(partial(whole, form=UNCHANGED))
    assert (gradient(partial(token_logprobs, chunk_tokens=5)) - true).norm() < 1e-12 * true.norm()


@parameterized.expand([(0,), (-3,), (True,), (1.5,), ("8",)])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(flexpatch.FlexpatchError, match=f"chunk_tokens={size!r}; expected"):
        token_logprobs(head_of("frozen"), torch.zeros(1, D), torch.zeros(1, dtype=torch.int64), chunk_tokens=size)


@parameterized.expand([("llama", 0), ("gemma3_text", 1), ("qwen2", 0)])
def test_a_model_in_chunks(model_type: str, variant: int) -> None:
    """Every parameter trained, the tied head included; the head never sees a prompt, or more than a chunk."""
    model, sizes = flexpatch.apply(tiny_model(model_type, variant)), []
    model.get_output_embeddings().register_forward_hook(lambda m, args, output: sizes.append(output.shape[:-1].numel()))
    rows = flexpatch.build_rows([trees()])
    Result.of(model, flexpatch.answer_logprobs(model, rows, chunk_tokens=20)).matches(oracle(model_type, variant))
    assert max(sizes) == 20 and sum(sizes) == 2 * len(rows.targets)


def test_a_forgotten_cap_is_noticed() -> None:
    model = flexpatch.apply(tiny_model("gemma3_text", 1))
    rows = flexpatch.build_rows([trees()])
    model.config.final_logit_softcapping = None
    Result.of(model, flexpatch.answer_logprobs(model, rows)).differs(oracle("gemma3_text", 1))


def test_sums_of_answers() -> None:
    rows = flexpatch.build_rows([trees()])
    tokens = torch.randn(len(rows.targets), dtype=torch.float64, requires_grad=True)
    sums = sum_answers(tokens, rows)
    weights = torch.arange(1.0, len(sums) + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), tokens)
    for weight, ours, answer in zip(weights, sums, rows.answer_tokens, strict=True):
        own = answer[answer < len(tokens)]
        assert (ours - tokens[own].sum()).abs() < 1e-12
        assert (gradient[own] == weight).all()


def test_a_graph_without_a_backward_is_freed() -> None:
    model = flexpatch.apply(tiny_model("llama"))
    tokens = weakref.ref(flexpatch.answer_logprobs(model, flexpatch.build_rows([trees()])).tokens)
    assert tokens() is None


@parameterized.expand([(True,), (False,)])
def test_a_model_that_lost_its_hooks_says_so(states: bool) -> None:
    model = flexpatch.apply(tiny_model("llama"))
    model.config.output_hidden_states = states
    rows = flexpatch.build_rows([trees()])
    Result.of(model, flexpatch.answer_logprobs(model, rows)).matches(oracle("llama", 0))
    model.base_model._forward_hooks.clear()
    with pytest.raises(flexpatch.FlexpatchError, match=r"flexpatch\.apply"):
        flexpatch.answer_logprobs(model, rows)


def test_hooks_of_others_come_first() -> None:
    """Whoever changes a backbone's hidden states changes log-probs."""
    model, rows = tiny_model("llama"), flexpatch.build_rows([trees()])

    def halve(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state / 2
        return output

    model.base_model.register_forward_hook(halve)
    true = Result.of(model, separate(model, trees()))
    true.differs(oracle("llama", 0))
    Result.of(flexpatch.apply(model), flexpatch.answer_logprobs(model, rows)).matches(true)


def test_log_probs_are_not_rounded_with_a_models_outputs() -> None:
    """As accelerate's FSDP2 rounds them; gradients still go through what the forward returned."""
    model, rows = flexpatch.apply(tiny_model("llama")), flexpatch.build_rows([trees()])
    seen: list[Tensor] = []

    def rounded(module: nn.Module, args: Any, output: Any) -> Any:
        output.hidden_states = tuple(h.bfloat16() for h in output.hidden_states)
        output.hidden_states[0].register_hook(seen.append)
        return output

    model.register_forward_hook(rounded)
    logps = flexpatch.answer_logprobs(model, rows)
    assert (logps.tokens - oracle("llama", 0).tokens).abs().max() < BOUNDS[0]
    logps.answers.sum().backward()
    assert len(seen) == 1


def test_a_model_without_a_head() -> None:
    backbone = flexpatch.apply(AutoModel.from_config(tiny_model("llama").config))
    with pytest.raises(flexpatch.FlexpatchError, match="AutoModelForCausalLM"):
        flexpatch.answer_logprobs(backbone, flexpatch.build_rows([trees()]))


@parameterized.expand([("logit_scale", 0.5), ("logits_scaling", 8.0), ("final_logit_softcapping", 30.0)])
def test_scaled_logits_of_which_an_adapter_does_not_know(name: str, value: float) -> None:
    model = flexpatch.apply(tiny_model("llama"))
    setattr(model.config, name, value)
    with pytest.raises(flexpatch.UnsupportedModelError, match=rf"{name}.*logit_transform="):
        flexpatch.answer_logprobs(model, flexpatch.build_rows([trees()]))


def test_two_ranks_that_shard_the_model(tmp_path: Path) -> None:
    """FSDP2 with the head in a shard of its own, or in the model's: the same log-probs and gradients."""
    start_python([*torchrun(), str(PROGRAMS / "sharded_ranks.py"), str(tmp_path)], tmp_path)
    true = oracle("llama", 0)
    for kind in ("head alone", "head in root", "frozen head alone", "frozen head in root"):
        tokens, squares = torch.load(tmp_path / f"{kind}.pt")
        assert (tokens - true.tokens).abs().max() < BOUNDS[0], kind
        whole = torch.load(tmp_path / f"{kind} whole.pt")
        assert abs(squares - whole) < 1e-9 * whole, kind


def test_separate_log_probs_of_nothing_and_of_ids_that_are_none() -> None:
    model = tiny_model("llama")
    for nothing in ([], [flexpatch.Tree([1, 2])]):
        answers, tokens = flexpatch.separate_logprobs(model, nothing)
        assert answers.shape == tokens.shape == (0,)
    pair = flexpatch.Tree.of([1], [2], [3, 4])
    for settings, words in (
        (dict(pad_id=151), "pad_id 151 is outside the vocabulary of 151"),
        (dict(batch_size=0), "batch_size=0; expected at least 1"),
    ):
        with pytest.raises(flexpatch.FlexpatchError, match=words):
            flexpatch.separate_logprobs(model, [pair], **settings)
    with pytest.raises(flexpatch.FlexpatchError, match="sample 1: id 151 is outside the vocabulary of 151"):
        flexpatch.separate_logprobs(model, [pair, flexpatch.Tree.of([1], [151])])
    rows = flexpatch.build_rows([[pair], [pair, pair]], pad_id=151)
    with pytest.raises(flexpatch.FlexpatchError, match="pad_id=151 is outside the vocabulary of 151"):
        flexpatch.answer_logprobs(flexpatch.apply(model), rows)
