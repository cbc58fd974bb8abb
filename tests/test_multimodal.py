"""A multimodal class: its text stack is patched and nothing else, and its calls of text fold."""

from typing import Any

import pytest
import torch
from helpers.batches import padded_batch
from helpers.media import awkward
from helpers.needs import needs_type
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch import FlexpatchWarning
from flexpatch.calls import IMAGES, obstacle
from flexpatch.internals import backbone_of, text_config
from flexpatch.layouts import multimodal_types
from flexpatch.models import tiny_model, tiny_types
from flexpatch.pictures import call_with_images

IMAGE = 149  # of the adapter's tiny configurations: one token of an image, of which each has four
CASES = [
    case for case in [("gemma3", 0), ("gemma4", 0), ("gemma4", 1), ("gemma4_unified", 0)] if case[0] in tiny_types()
]
# Types whose calls bring images or sound under names of their own, or to the text model's own forward.
MEDIA = [
    *(("git", "pixel_values"), ("emu3", "pixel_values"), ("mllama", "cross_attention_states")),
    *(("phi4_multimodal", "image_pixel_values"), ("phi4_multimodal", "audio_input_features")),
    *(("moss_transcribe_diarize", "input_features"), ("dots3_note", "input_features")),
]
TYPES = dict(gemma3="token_type_ids", gemma4="mm_token_type_ids", gemma4_unified="mm_token_type_ids")


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


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


@parameterized.expand(CASES)
def test_image_tokens_without_images_run_as_given(model_type: str, variant: int) -> None:
    model, batch = tiny_model(model_type, variant), padded_batch()
    batch["input_ids"][::3, 1:5] = IMAGE
    batch[TYPES[model_type]] = (batch["input_ids"] == IMAGE).long()
    before = logits(model, batch)
    flexpatch.apply(model)
    with pytest.warns(FlexpatchWarning, match="with images, sound or video run as they are given"):
        assert torch.equal(logits(model, batch), before)
    assert flexpatch.savings(model).folded == 0


@parameterized.expand(MEDIA)
def test_media_of_any_number_are_noticed(model_type: str, argument: str) -> None:
    """Also where text and images go through one forward. There may be more or fewer images than sequences."""
    needs_type(model_type)
    model, batch = flexpatch.apply(tiny_model(model_type)), padded_batch()
    for images in (1, len(batch["input_ids"])):
        call = batch | {argument: torch.zeros(images, 3, 28, 28, dtype=torch.float64)}
        assert obstacle(backbone_of(model), text_config(model), call) == IMAGES
    assert obstacle(backbone_of(model), text_config(model), batch) is None


def test_images_of_a_class_without_a_record_run_as_given() -> None:
    needs_type("qwen4_exp")
    model = tiny_model("qwen4_exp")
    batch = call_with_images(
        multimodal_types()["qwen3_5"], model.config, *vars(awkward("qwen3_5", model.config)).values()
    )
    before = logits(model, batch)
    flexpatch.apply(model)
    with pytest.warns(FlexpatchWarning, match="with images, sound or video run as they are given"):
        assert torch.equal(logits(model, batch), before)


def test_the_vision_tower_is_left_alone() -> None:
    model = tiny_model("gemma3")
    tower, stack = model.model.vision_tower, model.model.language_model
    flexpatch.apply(model)
    assert model.config._attn_implementation == tower.config._attn_implementation == "sdpa"
    assert stack.config._attn_implementation == "flexpatch_sdpa"
    assert flexpatch.is_applied(model)
    flexpatch.remove(model)
    assert stack.config._attn_implementation == "sdpa" and not flexpatch.is_applied(model)
