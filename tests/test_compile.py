"""Compiled decoder layers: the same numbers, few graphs, and nothing compiled but rows."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import peft
import pytest
import torch
from helpers.oracle import (
    MODELS,
    Result,
    bounds_of,
    deep,
    name,
    oracle,
    packed_positions,
    random_ids,
    see_siblings,
    separate,
    trees,
)
from parameterized import parameterized
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel

import flexpatch
from flexpatch import Tree, build_rows, compiled, internals, model_inputs, patch
from flexpatch.models import adapter_of, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("flex_on_cpu")
ROWS = [trees()]


def compiled_model(model_type: str, variant: int = 0, **options: object) -> nn.Module:
    return flexpatch.apply(tiny_model(model_type, variant), backend="flex", compile=True, **options)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs of layers."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(compiled._plain, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(compiled, "_compiled", lambda: function)
    return counter


def compiles(model_type: str, variant: int) -> bool:
    """Tell whether layers compile here: experts do in 16 bits on a GPU alone, mixers on separate sequences never."""
    adapter = adapter_of(model_type)
    if adapter.unshared or not adapter.marks:
        return False
    config = tiny_config(model_type, variant)
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except NotImplementedError:  # Apertus' activation reads a number as it is made, in transformers 5.0
        model = AutoModel.from_config(config)
    return not any("experts" in name for name, _ in model.named_modules())


DENSE = [case for case in MODELS if compiles(*case)]


KINDS = [("qwen2", 1), ("gemma2", 0)]


@parameterized.expand(KINDS, name_func=name)
def test_parity(model_type: str, variant: int) -> None:
    parity(model_type, variant)


@parameterized.expand([case for case in DENSE if case not in KINDS], name_func=name)
@pytest.mark.slow
def test_parity_of_all(model_type: str, variant: int) -> None:
    parity(model_type, variant)


def parity(model_type: str, variant: int) -> None:
    model, rows, true = compiled_model(model_type, variant), build_rows(ROWS), oracle(model_type, variant)
    bounds = bounds_of(model_type)
    Result.packed(model, rows).matches(true, bounds)
    Result.packed(model, see_siblings(rows)).differs(true, bounds)
    Result.packed(model, packed_positions(rows)).differs(true, bounds)


@parameterized.expand([("llama", True)], name_func=name)
def test_parity_under_checkpointing(model_type: str, reentrant: bool) -> None:
    parity_under_checkpointing(model_type, reentrant)


@parameterized.expand([("llama", False), ("gemma3_text", False), ("gemma2", False)], name_func=name)
@pytest.mark.slow
def test_parity_of_others_under_checkpointing(model_type: str, reentrant: bool) -> None:
    parity_under_checkpointing(model_type, reentrant)


def parity_under_checkpointing(model_type: str, reentrant: bool) -> None:
    model = compiled_model(model_type).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    bounds = bounds_of(model_type)
    Result.packed(model, build_rows(ROWS)).matches(oracle(model_type, 0), bounds)


def test_parity_with_some_layers_computed_again() -> None:
    parity_with_some_layers_computed_again(reentrant=False)


@pytest.mark.slow
def test_parity_with_some_layers_computed_again_by_the_older_kind() -> None:
    parity_with_some_layers_computed_again(reentrant=True)


def parity_with_some_layers_computed_again(reentrant: bool) -> None:
    model = deep("llama", 5)
    true = Result.of(model, separate(model, trees()))
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for options in ({}, dict(recompute_layers=2), dict(compile=True, recompute_layers=2)):
        flexpatch.apply(model, backend="flex", **options)
        Result.packed(model, build_rows(ROWS)).matches(true)


def test_a_mask_of_other_rows_is_refused() -> None:
    model = compiled_model("llama")
    short, long = (model_inputs(model, build_rows([[Tree.of(*random_ids(n, 40, 20))]])) for n in (50, 400))
    for rows, mask in ((short, long), (long, short)):
        with pytest.raises(flexpatch.FlexpatchError, match="block mask is for"):
            model(**(rows | {"attention_mask": mask["attention_mask"]}))


@pytest.mark.usefixtures("one_rank")
def test_ddp_leaves_a_layer_one_graph(graphs: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch splits what is compiled in DDP's forward by DDP's buckets, each of which here holds some of a layer."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 10_000)
    for split in (False, True):
        if split:
            monkeypatch.setattr(compiled, "many_recompiles", nullcontext)
        model = flexpatch.apply(deep("llama", 4), backend="flex", compile=True)
        rows = build_rows(ROWS)
        nn.parallel.DistributedDataParallel(model)(**model_inputs(model, rows)).logits.sum().backward()
        assert (graphs.frame_count > 1) is split, graphs.frame_count
        torch._dynamo.reset()
        graphs.clear()


def test_one_graph_for_all_layers_and_lengths_of_a_bucket(graphs: CompileCounterWithBackend) -> None:
    model = flexpatch.apply(deep("llama", 4), backend="flex", compile=True)
    counts = []
    for length in (200, 230, 256, 140):
        rows = build_rows([[Tree.of(*random_ids(length - 60, 40, 20))]])
        flexpatch.answer_logprobs(model, rows).answers.sum().backward()
        counts.append(graphs.frame_count)
    assert counts == [1] * 4
    flexpatch.answer_logprobs(model, build_rows([[Tree.of(*random_ids(250, 40, 20))]]))
    assert graphs.frame_count == 2, "another bucket"


def test_lora_and_its_reference(graphs: CompileCounterWithBackend) -> None:
    """peft's layers compile without a break, with adapters on and off."""
    model = deep("llama", 3)
    settings = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, settings).double()
    rows = build_rows(ROWS)
    true = Result.packed(flexpatch.apply(model, backend="flex"), rows)
    with model.disable_adapter(), torch.no_grad():
        reference = flexpatch.answer_logprobs(model, rows).answers
    flexpatch.apply(model, backend="flex", compile=True)
    Result.packed(model, rows).matches(true)
    with model.disable_adapter(), torch.no_grad():
        ours = flexpatch.answer_logprobs(model, rows).answers
    assert (ours - reference).abs().max() < 1e-10 < (ours - true.answers).abs().max()
    # The first layer's input needs no gradient, the others' do; and the reference.
    assert graphs.frame_count == 3


def test_folded_batches() -> None:
    model = tiny_model("qwen2", 1)
    p, a, b = random_ids(90, 20, 20)
    ids = torch.tensor([p + a, p + b])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    expected = model(**batch).logits
    flexpatch.apply(model, backend="flex", compile=True)
    assert (model(**batch).logits - expected).abs().max() < 1e-10
    assert flexpatch.savings(model).folded == 1
    # Leaves hooks in the layers, which record at call time; transformers before 5.2 replaces the layers' forwards.
    recorded = "output_hidden_states" if internals.COLLECTOR is None else "output_attentions"
    flexpatch.remove(model)(**batch, **{recorded: True})
    torch._dynamo.reset()
    if internals.COLLECTOR is None:
        with pytest.raises(flexpatch.UnsupportedModelError, match="library replaced the forward"):
            flexpatch.apply(model, backend="flex", compile=True)
    else:
        assert (flexpatch.apply(model, backend="flex", compile=True)(**batch).logits - expected).abs().max() < 1e-10
    flexpatch.apply(model, backend="flex")
    assert (model(**batch).logits - expected).abs().max() < 1e-10


@pytest.mark.skipif(internals.COLLECTOR is None, reason="transformers before 5.2 replaces forwards to record outputs")
@pytest.mark.parametrize(
    "checkpointing", [pytest.param(None, marks=pytest.mark.slow), False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_router_logits_of_folded_batches(
    checkpointing: bool | None, graphs: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Router logits leave compiled layers with their gradients, under both kinds of checkpointing too."""
    stock = tiny_model("qwen3_moe", dtype=torch.float32).train()
    stock.set_experts_implementation("grouped_mm")  # as on a GPU: a loop over experts does not compile
    prompt, *answers = random_ids(90, 20, 20)
    ids = torch.tensor([prompt + answer for answer in answers])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_router_logits=True)
    model = copy.deepcopy(stock)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    flexpatch.apply(model, backend="flex", compile=True)

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(**batch)
        (output.aux_loss + output.logits[:, -9:].square().mean()).backward()
        weights = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [torch.stack(output.router_logits).detach(), output.aux_loss.detach(), torch.cat(weights)]

    ours, (plain, model) = results(), (model, stock)
    true = results()
    assert flexpatch.savings(plain).folded == 1
    assert graphs.frame_count in (1, 2)  # the first layer's input may need no gradient
    for mine, theirs in zip(ours, true, strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    model = plain
    monkeypatch.setattr(compiled, "ROUTERS", "nothing of this name")  # the control
    with pytest.raises((TypeError, RuntimeError, ValueError, IndexError)):
        results()


def test_other_calls_are_not_compiled(graphs: CompileCounterWithBackend) -> None:
    """A decoding step has another length every time."""
    model, prompt = tiny_model("mistral"), torch.tensor(random_ids(9, 9))
    generate = partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)
    before, logits = generate(do_sample=False), model(prompt).logits
    flexpatch.apply(model, backend="flex", compile=True)
    assert torch.equal(generate(do_sample=False), before)
    assert torch.equal(model(prompt).logits, logits)
    assert graphs.frame_count == 0


def test_removing() -> None:
    model = compiled_model("llama")
    assert all("forward" in vars(layer) for layer in model.model.layers)
    flexpatch.apply(model, backend="flex")
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert not patch.settings_of(model)["compile"]
    flexpatch.remove(flexpatch.apply(model, backend="flex", compile=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_copies_compile_their_own_weights() -> None:
    model, rows = compiled_model("llama"), build_rows(ROWS)
    expected = flexpatch.answer_logprobs(model, rows).answers
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(flexpatch.answer_logprobs(other, rows).answers, expected)
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert not torch.equal(flexpatch.answer_logprobs(other, rows).answers, expected)
        assert torch.equal(flexpatch.answer_logprobs(model, rows).answers, expected)


def test_experts_that_are_looped_over_are_refused() -> None:
    """As float64 needs them. tests/gpu compiles grouped products."""
    with pytest.raises(flexpatch.UnsupportedModelError, match=r"set_experts_implementation.*Torch says") as error:
        flexpatch.answer_logprobs(compiled_model("mixtral"), build_rows(ROWS))
    assert len(str(error.value)) < 800


@parameterized.expand([("DoRA",), ("LoHa",), ("LoKr",)])
def test_adapters_that_do_not_compile_are_refused_by_name(kind: str) -> None:
    """Where a release of torch or peft compiles them, they are right."""
    configs = dict(
        DoRA=peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoHa=peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
        LoKr=peft.LoKrConfig(target_modules=["q_proj"], init_weights=False),
    )
    model = peft.get_peft_model(deep("llama", 2), configs[kind]).double()
    rows = build_rows(ROWS)
    true = Result.packed(flexpatch.apply(model, backend="dense"), rows)
    flexpatch.apply(model, backend="flex", compile=True)
    try:
        ours = Result.packed(model, rows)
    except flexpatch.UnsupportedModelError as error:
        assert kind in str(error) and len(str(error)) < 800
    else:
        ours.matches(true)


def test_a_foreign_forward_is_not_overwritten() -> None:
    model = tiny_model("llama")
    model.model.layers[1].forward = model.model.layers[1].forward
    with pytest.raises(flexpatch.UnsupportedModelError, match="another library"):
        flexpatch.apply(model, compile=True)
    assert not flexpatch.is_applied(model), "a refusal leaves the model as it was"


def test_the_dense_backend_says_that_it_is_not_compiled() -> None:
    model = flexpatch.apply(tiny_model("llama"), backend="dense", compile=True)
    with pytest.warns(flexpatch.FlexpatchWarning, match="no effect on the dense backend"):
        Result.packed(model, build_rows(ROWS)).matches(oracle("llama", 0))
