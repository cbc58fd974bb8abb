"""What ``apply`` can be asked for, through compiled kernels: compiled layers, measured recomputation, log-probs in
chunks; and Liger's kernels, whichever is applied first."""

import copy
import gc
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import pytest
import torch
from parameterized import parameterized
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl.models.activation_offloading import get_act_offloading_ctx_manager

import flexpatch
from flexpatch.checkpointing import USABLE
from flexpatch.logprobs import token_logprobs
from flexpatch.masks import bucket
from flexpatch.models import tiny_model
from flexpatch.parity import check_parity
from flexpatch.rows import Rows, build_rows
from flexpatch.selective import way_of
from flexpatch.tree import Tree

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]
DEVICE = torch.device("cuda")
KINDS = [("llama", 0), ("mistral", 1), ("gemma2", 0), ("gemma3_text", 1), ("qwen3", 1)]
# Of many layers: one that keeps everything, to be measured, then takes little of what all may.
WIDE = dict(
    hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=32000, max_position_embeddings=32768,
)  # fmt: skip


def trees_of(*lengths: tuple[int, ...], vocabulary: int = 151) -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    return [Tree.of(*(torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in t)) for t in lengths]


def rows_of(*lengths: tuple[int, ...], vocabulary: int = 151) -> Rows:
    return build_rows([trees_of(*lengths, vocabulary=vocabulary)]).to(DEVICE)


def wide() -> nn.Module:
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE), dtype=torch.bfloat16).train()


def step(model: nn.Module, rows: Rows, between: Callable[[], Any] = lambda: None) -> tuple[Tensor, Tensor]:
    """Answers' log-probs, and the gradient of a DPO loss. ``between`` is called before backward."""
    model.zero_grad()
    answers = flexpatch.answer_logprobs(model, rows).answers
    between()
    flexpatch.dpo_loss(answers).loss.backward()
    trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return answers.detach(), torch.cat(trained)


@parameterized.expand(
    [(*kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16)]
    + [("mixtral", 0, torch.bfloat16)]  # in float32 torch 2.11 cannot compile what experts run on
)
def test_parity_of_compiled_layers(model_type: str, variant: int, dtype: torch.dtype) -> None:
    model = flexpatch.apply(tiny_model(model_type, variant, dtype=dtype).to(DEVICE), compile=True)
    # The verifier applies with its own options: the settings of the model go in through them.
    report = check_parity(model, compile=True)
    assert report.settings["compiled"] == "layers"
    assert report.passed, str(report)


def test_parity_of_compiled_layers_with_lora_and_checkpointing() -> None:
    model = tiny_model("qwen2", 1, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    report = check_parity(model.to(DEVICE).train(), compile=True)
    assert report.passed, str(report)


def test_no_graph_is_compiled_twice() -> None:
    """An epoch of mixed lengths: a graph of the layers for each bucket, one of the softmax, and then none."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = flexpatch.apply(tiny_model("llama", dtype=torch.bfloat16).to(DEVICE), compile=True)
    counts, epoch = [], [rows_of((length - 60, 40, 20)) for length in (300, 340, 380, 250, 140, 500, 384, 256)]
    for _ in range(2):
        for rows in epoch:
            step(model, rows)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [len({bucket(rows.tokens) for rows in epoch}) + 1] * 2, counts


def test_a_chunk_of_logits_is_all_that_is_held() -> None:
    """20,000 tokens of 128,256 logits would be 5 GB, with float32 copies and gradients 25."""
    tokens, hidden_size, vocabulary = 20_000, 1024, 128_256
    head = nn.Linear(hidden_size, vocabulary, bias=False, device=DEVICE, dtype=torch.bfloat16)
    for trained in (False, True):
        head.requires_grad_(trained)
        hidden = torch.randn(tokens, hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logprobs(head, hidden, targets).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 4e9, trained
        if not trained:
            true = head(hidden[:500]).double().log_softmax(-1).gather(-1, targets[:500, None])[:, 0]
            assert (token_logprobs(head, hidden[:500], targets[:500]) - true).abs().max() < 1e-5


@parameterized.expand([(True, 0.5, "products"), (False, 0.5, "products"), (True, 0.2, "attention")])
def test_as_little_is_computed_again_as_memory_allows(compiled: bool, share: float, way: str) -> None:
    """Under a memory limit that a share of activations fits: the peak comes near to it, and gradients stay."""
    torch._dynamo.reset()
    model = wide()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = rows_of(*[(400, 300, 300)] * 8, vocabulary=32000)
    flexpatch.apply(model, compile=compiled)
    expected = step(model, rows)

    def most() -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step(model, rows)
        return torch.cuda.max_memory_reserved()

    checkpointed = most()
    flexpatch.apply(model, compile=compiled, recompute_layers=0)
    kept_all = most()
    total = torch.cuda.mem_get_info()[1]
    limit = (checkpointed + share * (kept_all - checkpointed)) / USABLE
    peaks: list[int] = []
    keeps: list[Counter[str]] = []  # each time that the first layer runs: how many layers keep what
    layers = list(model.model.layers)
    layers[0].register_forward_pre_hook(lambda *_: keeps.append(Counter(map(way_of, layers))))

    def steps() -> tuple[Tensor, Tensor]:
        flexpatch.apply(model, compile=compiled, recompute_layers="auto")
        for _ in range(5):
            keeps.clear()
            ours = None  # a step's results are large, and no step of training holds the last one's
            torch.cuda.reset_peak_memory_stats()
            ours = step(model, rows)
            model.get_input_embeddings().weight.data[0, 0] += 1  # an optimizer's step, of a token that does not occur
            peaks.append(torch.cuda.max_memory_allocated())
        assert ours is not None
        return ours

    steps()  # compiles, which takes memory that a first step would count
    torch.cuda.empty_cache()
    peaks.clear()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        ours = steps()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    counts = min(keeps, key=lambda found: found["nothing"])  # layers run again in backward, when nothing is set
    sizes = [round(size / 1e9, 2) for size in (checkpointed, kept_all, limit, *peaks)]
    print(f"GB: {sizes}; of 24 layers keep {dict(counts)}")
    assert counts[way] > 0 and counts["everything"] < 24, counts
    assert peaks[0] < peaks[-1] < limit
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - expected[1]).norm() < 1e-2 * expected[1].norm()


@parameterized.expand([(True,), (False,)])
def test_activation_offloading(compiled: bool) -> None:
    """Under TRL's hooks, which move what backward needs to the host: the same numbers in less memory."""
    torch._dynamo.reset()
    model = wide()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = rows_of(*[(400, 300, 300)] * 8, vocabulary=32000)
    flexpatch.apply(model, compile=compiled)
    context = get_act_offloading_ctx_manager(model)

    def run(where: AbstractContextManager[Any]) -> tuple[int, Tensor, Tensor]:
        """Bytes that wait for backward, log-probs, and the gradient."""
        model.zero_grad()
        before, held = torch.cuda.memory_allocated(), []
        with where:
            found = step(model, rows, lambda: held.append(torch.cuda.memory_allocated() - before))
        return held[0], *found

    step(model, rows)  # compiles
    held, expected, gradient = run(nullcontext())
    left, ours, moved = run(context)
    print(f"MB that wait for backward: {held / 1e6:.0f}, of which {left / 1e6:.0f} stay on the GPU")
    assert torch.equal(ours, expected)
    assert (moved - gradient).norm() < 1e-2 * gradient.norm()
    layer = 2 * rows.tokens * WIDE["hidden_size"]  # bytes of its input
    assert left < held - 12 * layer


@parameterized.expand([("liger first",), ("flexpatch first",)])
def test_with_liger(order: str) -> None:
    """Its norm, rope and SwiGLU kernels under our rows: as close to the truth as the unpatched model with them."""
    liger = pytest.importorskip("liger_kernel.transformers")
    model = tiny_model("qwen2", 1, dtype=torch.bfloat16).to(DEVICE).train()
    truth = copy.deepcopy(model).double()
    if order == "liger first":
        liger._apply_liger_kernel_to_instance(model=model)
    flexpatch.apply(model)
    if order == "flexpatch first":
        liger._apply_liger_kernel_to_instance(model=model)
    assert "liger" in type(model.model.layers[0].mlp).forward.__module__ + model.model.layers[0].mlp.forward.__module__
    trees = trees_of((200, 61, 33), (40, 5, 90), (7, 30, 2))
    ours = flexpatch.answer_logprobs(model, build_rows([trees]).to(DEVICE)).tokens
    true = flexpatch.separate_logprobs(truth, trees, batch_size=1).tokens
    stock = flexpatch.separate_logprobs(flexpatch.remove(model), trees, batch_size=1).tokens
    assert (ours - true).abs().mean() <= 2 * (stock - true).abs().mean()
