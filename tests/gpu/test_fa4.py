"""FlashAttention-4's kernels under the same masks: where backend="auto" takes them, and what backend="fa4" refuses.

Their block-sparse backward has had races and wrong gradients that raised nothing, hence the repeated launches.
"""

from collections.abc import Callable

import peft
import pytest
import torch
from helpers.attention import dense_attention, trees
from parameterized import parameterized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch
from flexpatch import FlexpatchError, UnsupportedModelError
from flexpatch.attention import flex
from flexpatch.masks import DEEP, block_mask, dense_mask
from flexpatch.parity import check_parity
from flexpatch.rows import build_rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _flash_attention_4() -> None:
    pytest.importorskip("flash_attn.cute")


def small(head_dim: int, window: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", hidden_size=256, num_hidden_layers=3, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, vocab_size=151, sliding_window=window, initializer_range=0.1,
    )  # fmt: skip
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@parameterized.expand([(64,), (96,), (128,), (128, 4096)])
def test_parity(head_dim: int, window: int | None = None) -> None:
    """A window that no sequence reaches is none."""
    report = check_parity(small(head_dim, window), backend="fa4")
    assert report.settings["backend"] == "fa4"
    assert report.passed, str(report)


def test_parity_of_compiled_layers_with_lora_and_checkpointing() -> None:
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(small(128), lora)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    report = check_parity(model.to(DEVICE).train(), backend="fa4", compile=True)
    assert report.passed, str(report)


def with_gradients(out: Tensor, qkv: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, qkv, weight.to(out.dtype))]


def distances(ours: list[Tensor], truth: list[Tensor]) -> Tensor:
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(ours, truth, strict=True)])


@parameterized.expand([(64,), (128,)])
def test_gradients_of_200_launches(head_dim: int) -> None:
    """Fresh inputs against float64. What is allowed is twice the error of Triton's kernels."""
    rows = build_rows([trees((700, 90, 41), (1, 33, 200), (129, 128, 1), (300, 300, 300))]).to(DEVICE)
    mask, visible = (make(rows.ends, rows.position_ids, None) for make in (block_mask, dense_mask))
    length, bound = rows.input_ids.shape[1], None
    for i in range(200):
        weight = torch.randn(1, length, 8, head_dim, device=DEVICE).bfloat16()
        qkv = [torch.randn(1, h, length, head_dim, device=DEVICE).bfloat16().requires_grad_() for h in (8, 2, 2)]
        exact = [x.detach().double().requires_grad_() for x in qkv]
        truth = with_gradients(dense_attention(*exact, visible), exact, weight)
        if bound is None:
            bound = 2 * distances(with_gradients(flex(*qkv, mask), qkv, weight), truth)
        ours = distances(with_gradients(flex(*qkv, mask, fa4=True), qkv, weight), truth)
        assert (ours <= bound).all(), (i, ours, bound)  # NaN is not


@parameterized.expand([(64,), (128,)])
def test_deep_rows_take_it_by_themselves(head_dim: int) -> None:
    """Log-probs and gradients of "auto" over a deep row: as close to float32 as Triton's kernels, times two."""
    rows = build_rows([trees((3000, 300, 200), (2500, 100, 700))]).to(DEVICE)
    model = small(head_dim)
    wide = small(head_dim).float()

    def results(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        tokens = flexpatch.answer_logprobs(model, rows).tokens
        (tokens * torch.linspace(-1, 1, len(tokens), device=DEVICE)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return [tokens.detach().double(), gradient.double()]

    true = results(flexpatch.apply(wide, backend="flex"))
    assert not any(getattr(mask, DEEP) for mask in rows.masks.values())
    triton = distances(results(flexpatch.apply(model, backend="flex")), true)
    rows.masks.clear()
    ours = results(flexpatch.apply(model))
    assert [getattr(mask, DEEP) for mask in rows.masks.values()] == [True]
    assert not any(
        torch.equal(a, b) for a, b in zip(ours, results(flexpatch.apply(model, backend="flex")), strict=True)
    )
    print(f"heads of {head_dim}: off by {distances(ours, true).tolist()} (Triton: {triton.tolist()})")
    assert (distances(ours, true) <= 2 * triton).all()
    rows.masks.clear()
    torch.use_deterministic_algorithms(True)
    try:
        flexpatch.model_inputs(flexpatch.apply(model), rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(getattr(mask, DEEP) for mask in rows.masks.values())
    # A row that is not deep runs on Triton's kernels.
    other = build_rows([trees((300, 90, 41))]).to(DEVICE)
    flexpatch.answer_logprobs(flexpatch.apply(model), other)
    assert not any(getattr(mask, DEEP) for mask in other.masks.values())


def test_what_adds_in_no_fixed_order() -> None:
    """Gradients of stock attention in a training step differ in last bits from run to run too: "auto" gives nothing up
    that the unpatched model had. Triton's kernels have one result."""
    length, heads = 8192, 8
    rows = build_rows([trees((6000, 1000, 1192))]).to(DEVICE)
    mask = block_mask(rows.ends, rows.position_ids, None)
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v, gradient = (
        torch.randn(1, heads, length, 128, device=DEVICE, generator=generator).bfloat16() for _ in range(4)
    )

    def stock(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    ways: dict[str, Callable[[], Tensor]] = {
        "sdpa, flash": lambda: stock(SDPBackend.FLASH_ATTENTION),
        "sdpa, cuDNN": lambda: stock(SDPBackend.CUDNN_ATTENTION),
        "flex, Triton": lambda: flex(q, k, v, mask),
        "flex, FlashAttention-4": lambda: flex(q, k, v, mask, fa4=True),
    }
    counts = {}
    for x in (q, k, v):
        x.requires_grad_()
    for name, attend in ways.items():
        found = [torch.autograd.grad(attend(), (q, k, v), gradient.transpose(1, 2)) for _ in range(20)]
        counts[name] = len({torch.cat(each).view(torch.uint8).cpu().numpy().tobytes() for each in found})
    print(f"different gradients of 20 runs: {counts}")
    assert counts["flex, Triton"] == 1
    assert counts["sdpa, flash"] > 1 or counts["sdpa, cuDNN"] > 1


def test_what_it_cannot_do_is_refused() -> None:
    rows = build_rows([trees((200, 61, 33))]).to(DEVICE)
    model = flexpatch.apply(small(128).float(), backend="fa4")
    with pytest.raises(UnsupportedModelError, match="computes in 16 bits, and this model in"):
        flexpatch.answer_logprobs(model, rows)
    with pytest.raises(UnsupportedModelError, match="heads of 64, 96, 128, and this model's have 32"):
        flexpatch.apply(small(32), backend="fa4")
    with pytest.raises(UnsupportedModelError, match="beyond this model's window of 64"):
        flexpatch.answer_logprobs(flexpatch.apply(small(128, 64), backend="fa4"), rows)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(FlexpatchError, match="no fixed order"):
            flexpatch.answer_logprobs(flexpatch.apply(small(128), backend="fa4"), rows)
    finally:
        torch.use_deterministic_algorithms(False)
