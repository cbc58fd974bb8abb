"""A multimodal class: its text stack is patched and nothing else, and calls with images run as they are given."""

from typing import Any

import pytest
import torch
from helpers.batches import padded_batch
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch import FlexpatchWarning
from flexpatch.layouts import multimodal_types
from flexpatch.models import tiny_model, tiny_types

IMAGE = 149  # of the adapter's tiny configurations: one token of an image, of which each has four
CASES = [
    case for case in [("gemma3", 0), ("gemma4", 0), ("gemma4", 1), ("gemma4_unified", 0)] if case[0] in tiny_types()
]
TYPES = dict(gemma3="token_type_ids", gemma4="mm_token_type_ids", gemma4_unified="mm_token_type_ids")


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


def with_images(model_type: str) -> dict[str, Any]:
    """The first of three answers to each prompt begins with an image."""
    batch = padded_batch()
    batch["input_ids"][::3, 1:5] = IMAGE
    batch[TYPES[model_type]] = (batch["input_ids"] == IMAGE).long()
    # Patches along each side, and numbers in a patch; Gemma 3 takes the images themselves.
    side, size = dict(gemma3=(1, 3 * 28 * 28), gemma4=(4, 3 * 4 * 4), gemma4_unified=(2, 3 * 8 * 8))[model_type]
    pixels = torch.randn(3, side * side, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if model_type == "gemma3":
        return batch | dict(pixel_values=pixels.view(3, 3, 28, 28))
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(3, -1, -1)
    return batch | dict(pixel_values=pixels, image_position_ids=positions)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("types", ["none", "None", "zeros"])
@pytest.mark.parametrize(("model_type", "variant"), CASES)
def test_batches_of_text_are_folded(model_type: str, variant: int, types: str) -> None:
    """With the zeros that its processor adds, too."""
    model, batch = tiny_model(model_type, variant), padded_batch()
    if types != "none":
        batch[TYPES[model_type]] = None if types == "None" else torch.zeros_like(batch["input_ids"])
    before = logits(model, batch)
    flexpatch.apply(model)
    assert (logits(model, batch) - before).abs().max() < 1e-7  # norms and ropes round to float32
    assert flexpatch.savings(model).folded == 1


@pytest.mark.parametrize("given", ["types and pixels", "pixels", "types"])
@pytest.mark.parametrize(("model_type", "variant"), [case for case in CASES if case[0] not in multimodal_types()])
def test_calls_with_images_run_as_they_are_given(model_type: str, variant: int, given: str) -> None:
    model, batch = tiny_model(model_type, variant), with_images(model_type)
    if "types" not in given:
        batch.pop(TYPES[model_type])
    if "pixels" not in given:
        batch.pop("pixel_values")
    before = logits(model, batch)
    flexpatch.apply(model)
    with pytest.warns(FlexpatchWarning, match="with images, sound or video run as they are given"):
        assert torch.equal(logits(model, batch), before)
    assert flexpatch.savings(model).folded == 0


@parameterized.expand(CASES)
def test_images_matter(model_type: str, variant: int) -> None:
    """The control of the above: folded as if they were text, the same calls are wrong."""
    model, batch = tiny_model(model_type, variant), with_images(model_type)
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "use_cache")}
    before = logits(model, batch)
    flexpatch.apply(model)
    assert (logits(model, text) - before).abs().max() > 0.1


def test_the_vision_tower_is_left_alone() -> None:
    model = tiny_model("gemma3")
    tower, stack = model.model.vision_tower, model.model.language_model
    flexpatch.apply(model)
    assert model.config._attn_implementation == tower.config._attn_implementation == "sdpa"
    assert stack.config._attn_implementation == "flexpatch_sdpa"
    assert flexpatch.is_applied(model)
    flexpatch.remove(model)
    assert stack.config._attn_implementation == "sdpa" and not flexpatch.is_applied(model)
