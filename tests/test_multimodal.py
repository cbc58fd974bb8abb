"""A multimodal class: its text stack is patched and nothing else, and calls with images run as they are given."""

from typing import Any

import pytest
import torch
from test_fold import padded_batch
from torch import Tensor, nn

import flexpatch
from flexpatch import FlexpatchWarning, patch
from flexpatch.models import tiny_model

IMAGE = 149  # of the adapter's tiny configuration: one token of an image, of which each has four


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_gains", lambda *args: True)


def with_images() -> dict[str, Any]:
    """The first of three answers to each prompt begins with an image."""
    batch = padded_batch()
    batch["input_ids"][::3, 1:5] = IMAGE
    types = (batch["input_ids"] == IMAGE).long()
    pixels = torch.randn(3, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return batch | dict(token_type_ids=types, pixel_values=pixels)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("text", [dict(), dict(token_type_ids=None), dict(token_type_ids=0)])
def test_batches_of_text_are_folded(text: dict[str, Any]) -> None:
    """With the zeros that its processor adds, too."""
    model, batch = tiny_model("gemma3"), padded_batch() | text
    if batch.get("token_type_ids") == 0:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    before = logits(model, batch)
    flexpatch.apply(model)
    assert (logits(model, batch) - before).abs().max() < 1e-7  # norms and ropes round to float32
    assert flexpatch.savings(model).folded == 1


@pytest.mark.parametrize("left_out", ["", "token_type_ids", "pixel_values"])
def test_calls_with_images_run_as_they_are_given(left_out: str) -> None:
    model, batch = tiny_model("gemma3"), with_images()
    batch.pop(left_out, None)
    before = logits(model, batch)
    flexpatch.apply(model)
    with pytest.warns(FlexpatchWarning, match="images, whose tokens see ahead"):
        assert torch.equal(logits(model, batch), before)
    assert flexpatch.savings(model).folded == 0


def test_images_matter() -> None:
    """The control of the above: folded as if they were text, the same calls are wrong."""
    model, batch = tiny_model("gemma3"), with_images()
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "use_cache")}
    before = logits(model, batch)
    flexpatch.apply(model)
    assert (logits(model, text) - before).abs().max() > 0.1


def test_the_vision_tower_is_left_alone() -> None:
    model = tiny_model("gemma3")
    tower, stack = model.model.vision_tower, model.model.language_model
    flexpatch.apply(model)
    assert model.config._attn_implementation == tower.config._attn_implementation == "sdpa"
    assert stack.config._attn_implementation == "flexpatch_fold_auto_sdpa"
    assert flexpatch.is_applied(model)
    flexpatch.remove(model)
    assert stack.config._attn_implementation == "sdpa" and not flexpatch.is_applied(model)
