"""What runs on which card, with cards that nobody here owns: torch is told that it has them.

Shapes: B sequences, S columns, V tokens in the vocabulary.
"""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.needs import needs_type
from helpers.oracle import random_ids
from parameterized import parameterized

import flexpatch
from benchmarks import cards as cards_benchmark
from flexpatch import FlexpatchError, FlexpatchWarning, UnsupportedModelError, devices
from flexpatch.devices import Card, choose, heads_of
from flexpatch.internals import decoder_of, pretrained
from flexpatch.models import tiny_model

CUDA = torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32
T4, V100 = ("Tesla T4", (7, 5), 64), ("Tesla V100-SXM2-16GB", (7, 0), 96)
A100, H100 = ("NVIDIA A100-SXM4-80GB", (8, 0), 163), ("NVIDIA H100 80GB HBM3", (9, 0), 227)
R3090, R4090 = ("NVIDIA GeForce RTX 3090", (8, 6), 99), ("NVIDIA GeForce RTX 4090", (8, 9), 99)
R5090, B200 = ("NVIDIA GeForce RTX 5090", (12, 0), 99), ("NVIDIA B200", (10, 0), 227)
MI300 = ("AMD Instinct MI300X", (9, 4), 64)
AMPERE_ON = [A100, H100, R3090, R4090, R5090, B200]


class Cards:
    """Torch's answers about one CUDA device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.asked = 0

    def put(self, card: tuple[str, tuple[int, int], int], *, hip: bool = False, triton: bool = True) -> None:
        name, capability, shared = card

        def properties(index: Any) -> SimpleNamespace:
            self.asked += 1
            return SimpleNamespace(name=name, shared_memory_per_block_optin=shared * 1024)

        self.patch.setattr(torch.cuda, "current_device", lambda: 0)
        self.patch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        self.patch.setattr(torch.cuda, "get_device_properties", properties)
        self.patch.setattr(torch.version, "hip", "7.0" if hip else None)
        self.patch.setattr(devices, "_has_triton", lambda: triton)
        forget()

    def put_models_there(self) -> None:
        """Let models on the CPU pass for models on the card."""
        self.patch.setattr(flexpatch.dispatch, "choose", lambda asked, device, *rest: choose(asked, CUDA, *rest))


def forget() -> None:
    devices._cuda_card.cache_clear()
    devices._choose.cache_clear()
    devices._told.clear()


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    yield Cards(monkeypatch)
    forget()


def heads(*sizes: int | tuple[int, int]) -> frozenset[tuple[int, int]]:
    return frozenset(size if isinstance(size, tuple) else (size, size) for size in sizes)


@pytest.mark.parametrize("card", AMPERE_ON, ids=lambda card: card[0])
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 160, 192, (192, 128), 256, 512, (256, 512)], ids=str)
def test_flex_from_ampere_on(cards: Cards, card: Any, size: Any) -> None:
    cards.put(card)
    for asked in ("auto", "flex"):
        assert choose(asked, CUDA, heads(size), BF16) == ("flex", None)
    assert choose("dense", CUDA, heads(size), BF16) == ("dense", None)


REFUSED = {
    "T4": (T4, {}, BF16, (64,), r"Tesla T4: Triton supports compute capability 8\.0 .*this card has 7\.5"),
    "V100": (V100, {}, torch.float16, (64,), r"V100.*8\.0 .*has 7\.0"),
    "Windows": (R4090, {"triton": False}, BF16, (64,), r"RTX 4090: its kernels need Triton.*triton-windows"),
    "huge heads": (H100, {}, BF16, (1024,), r"heads of 1024 in torch\.bfloat16.*227 KB"),
    "huge values": (H100, {}, BF16, (64, (128, 600)), r"heads of 128 \(values: 600\)"),
    "wide numbers": (R3090, {}, FP32, (256, 512), r"heads of 512 in torch\.float32.*99 KB"),
    "small heads": (H100, {}, BF16, (8,), r"heads of 16 or more.*have 8"),
    "float64": (H100, {}, torch.float64, (64,), r"computes in torch\.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dense_with_its_cost_elsewhere(cards: Cards, case: str) -> None:
    card, options, dtype, sizes, message = REFUSED[case]
    cards.put(card, **options)
    backend, warning = choose("auto", CUDA, heads(*sizes), dtype)
    assert backend == "dense"
    with pytest.warns(FlexpatchWarning, match=message) as caught:
        devices.tell(devices.Choice(backend, warning))
    assert "L x L scores" in str(caught[0].message) and "Linear layers" in str(caught[0].message)
    with pytest.raises(UnsupportedModelError, match=r"backend='flex' cannot run on this .*backend='auto' uses 'dense'"):
        choose("flex", CUDA, heads(*sizes), dtype)
    assert choose("dense", CUDA, heads(*sizes), dtype) == ("dense", None)


def test_amd_gpus_are_untested_and_no_hoppers(cards: Cards) -> None:
    """An MI300 says that its capability is (9, 4)."""
    cards.put(MI300, hip=True)
    backend, warning = choose("auto", CUDA, heads(128), BF16)
    assert backend == "dense" and warning is not None and "never tested on AMD GPUs; backend='flex'" in warning
    backend, warning = choose("flex", CUDA, heads(128), BF16)
    assert backend == "flex" and warning is not None and "check_parity" in warning and "MI300X" in warning
    with pytest.raises(FlexpatchError, match="fa4' runs on Hopper GPUs, not on AMD Instinct MI300X"):
        choose("fa4", CUDA, heads(128), BF16)
    cards.put(MI300, hip=True, triton=False)
    with pytest.raises(UnsupportedModelError, match="need Triton"):
        choose("flex", CUDA, heads(128), BF16)


def test_flash_attention_4_is_for_hoppers(cards: Cards) -> None:
    cards.put(H100)
    assert choose("fa4", CUDA, heads(128), BF16) == ("fa4", None)
    for card in (A100, R5090, B200, T4):
        cards.put(card)
        with pytest.raises(FlexpatchError, match="fa4' runs on Hopper GPUs, not on"):
            choose("fa4", CUDA, heads(128), BF16)


@parameterized.expand(["cpu", "xpu", "mps", "meta"])
def test_other_devices_are_as_they_were(device: str) -> None:
    expected = "flex" if device == "xpu" else "dense"
    for asked in ("auto", "flex", "fa4", "dense"):
        choice = choose(asked, torch.device(device), heads(64, 512), BF16)
        assert choice == (expected if asked == "auto" else asked, None)
    assert dict(devices.tiles(torch.device(device), 64, 64, BF16)) == {}
    assert dict(devices.tiles(torch.device(device), 512, 512, BF16)) == devices.LARGE


def test_shared_memory_where_torch_does_not_tell(cards: Cards) -> None:
    for capability, kb in (((8, 6), 99), ((8, 0), 163), ((10, 3), 227), ((12, 1), 99), ((13, 0), 99)):
        cards.put(("a card", capability, 0))
        assert devices.card_of(CUDA) == Card("cuda", "a card", capability, kb, True)


def test_a_card_is_asked_once(cards: Cards) -> None:
    cards.put(R3090)
    for _ in range(100):
        choose("auto", torch.device("cuda"), heads(256), BF16)
        devices.tiles(CUDA, 256, 256, BF16)
    assert cards.asked == 1


def batch() -> dict[str, torch.Tensor]:
    prompt, a, b = random_ids(40, 10, 10)
    return {"input_ids": torch.tensor([prompt + a, prompt + b]), "use_cache": False}  # type: ignore[dict-item]


def caught(call: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    return result, [str(each.message) for each in seen if each.category is FlexpatchWarning]


def test_apply_warns_once_and_calls_do_not(cards: Cards) -> None:
    cards.put(T4)
    cards.put_models_there()
    model = tiny_model("llama")
    with torch.no_grad():
        true = model(**batch()).logits
    _, messages = caught(lambda: flexpatch.apply(model))
    assert len(messages) == 1 and "Tesla T4" in messages[0]
    assert flexpatch.patch.backend_of(model) == "dense"
    with torch.no_grad():
        output, messages = caught(lambda: [model(**batch()).logits for _ in range(3)])
    assert messages == []
    assert torch.allclose(output[0], true, rtol=0, atol=1e-10)
    assert flexpatch.savings(model).batches == 3
    _, messages = caught(lambda: flexpatch.apply(tiny_model("llama")))
    assert len(messages) == 1, "each model's user is told"


def test_a_model_moved_after_apply_is_told_at_its_first_call(cards: Cards) -> None:
    cards.put(T4)
    model, messages = caught(lambda: flexpatch.apply(tiny_model("llama")))
    assert messages == [] and flexpatch.patch.backend_of(model) == "dense"
    cards.put_models_there()
    with torch.no_grad():
        _, messages = caught(lambda: [model(**batch()) for _ in range(3)])
    assert len(messages) == 1 and "Tesla T4" in messages[0]


def test_a_refused_backend_leaves_the_model_as_it_was(cards: Cards) -> None:
    cards.put(T4)
    cards.put_models_there()
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"this card has 7\.5"):
        flexpatch.apply(model, backend="flex")
    assert model.config._attn_implementation == before and not flexpatch.patch.is_applied(model)
    assert not model.base_model._forward_pre_hooks
    cards.put(H100)
    cards.put_models_there()
    assert caught(lambda: flexpatch.apply(model.to(BF16), backend="flex"))[1] == []


@parameterized.expand(
    [
        ("llama", heads(16)),
        ("gpt_neox", heads(16)),
        ("gemma4_text", heads(16, 32)),
        ("gemma4", heads(16, 32)),
        ("deepseek_v3", heads((16, 16))),
    ]
)
def test_heads_of_all_layers(model_type: str, expected: Any) -> None:
    needs_type(model_type)
    model = tiny_model(model_type)
    assert heads_of(decoder_of(pretrained(model))) == expected


def test_heads_of_keys_and_values() -> None:
    model = tiny_model("deepseek_v3", 1)
    assert heads_of(model) == heads((16, 24))


def test_heads_of_layers_that_do_not_tell() -> None:
    config = SimpleNamespace(hidden_size=96, num_attention_heads=4)
    silent = torch.nn.Linear(1, 1)
    silent.config = config  # type: ignore[assignment]
    assert heads_of(silent) == heads(24)


TABLE = cards_benchmark.read()
COMBINATIONS = list(dict.fromkeys((line.head, line.dtype, line.card) for line in TABLE))


def lines_of(head: str, dtype: str, card: str) -> list[cards_benchmark.Line]:
    return [line for line in TABLE if (line.head, line.dtype, line.card) == (head, dtype, card)]


def needs(lines: list[cards_benchmark.Line]) -> float:
    return max(float(line.kb) for line in lines)


def test_the_table_is_whole() -> None:
    measured = {dtype: {head for head, each, _ in COMBINATIONS if each == dtype} for dtype in ("bfloat16", "float32")}
    assert measured["bfloat16"] >= {"64", "80", "96", "128", "160", "192", "192/128", "256", "512"}
    assert measured["float32"] >= {"160", "512"}
    assert len(COMBINATIONS) == sum(map(len, measured.values())) * len(cards_benchmark.CARDS)
    for combination in COMBINATIONS:
        assert {line.which for line in lines_of(*combination) if line.tiles_of == "torch"} == {"forward", "backward"}


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_what_runs_fits_as_measured(cards: Cards, combination: tuple[str, str, str]) -> None:
    head, name, _ = combination
    lines, dtype, sizes = lines_of(*combination), getattr(torch, name), cards_benchmark.sizes_of(head)
    shared = devices.SHARED_KB[lines[0].capability]
    cards.put(("a card", lines[0].capability, shared))
    backend, warning = choose("auto", CUDA, heads(sizes), dtype)
    if backend == "dense":
        assert warning is not None and needs(lines) > shared
        return
    options = dict(devices.tiles(CUDA, *sizes, dtype))
    for torchs in (line for line in lines if line.tiles_of == "torch"):
        prefix = {"forward": "fwd_", "backward": "bwd_"}[torchs.which]
        ours = {k.removeprefix(prefix).removeprefix("num_"): v for k, v in options.items() if k.startswith(prefix)}
        expected = tiles_of(torchs) | ours
        (run,) = [line for line in lines if line.which == torchs.which and tiles_of(line) == expected] or [None]
        assert run is not None, f"measure anew: {expected} is not in the table"
        assert float(run.kb) <= shared


def tiles_of(line: cards_benchmark.Line) -> dict[str, int]:
    return {name: int(value) for name, value in (tile.split("=") for tile in line.tiles.split())}


def test_torch_alone_would_not_fit() -> None:
    """The control: where flexpatch changes tiles, and where it does not."""
    dies = {
        (head, card)
        for head, dtype, card in COMBINATIONS
        if dtype == "bfloat16"
        and needs([line for line in lines_of(head, dtype, card) if line.tiles_of == "torch"])
        > devices.SHARED_KB[lines_of(head, dtype, card)[0].capability]
    }
    assert {("256", "8.6"), ("256", "8.9"), ("256", "12.0"), ("512", "8.6"), ("160", "8.0")} <= dies
    assert not {("128", "8.6"), ("128", "8.0"), ("128", "9.0"), ("256", "9.0")} & dies


def test_the_page_is_made_from_the_table() -> None:
    version = cards_benchmark.RESULTS.read_text().splitlines()[0]
    assert cards_benchmark.DOCS.read_text() == cards_benchmark.docs(TABLE, version)
