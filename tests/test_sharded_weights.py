"""A folded call reads weights in the forwards in which the unpatched call reads them, and in no others.

DeepSpeed's ZeRO-3 puts a dict of its own in place of each module's weights. It takes a weight that is read by its name
in another module's forward for one of that module's: it gathers it at once, and from then on with that module, in
backward too. Ranks gather together, and one whose batch is not folded would not read it. These tests note reads as
DeepSpeed does.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.batches import padded_batch
from helpers.media import awkward, call_of
from helpers.needs import needs
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import flexpatch
from flexpatch import towers
from flexpatch.layouts import media_of
from flexpatch.models import tiny_model

LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
# In whose forward, of which module, by which name.
Read = tuple[str, str, str]

pytestmark = needs("transformers", "5.17", "images fold from there on")


@pytest.fixture(autouse=True)
def _the_tower_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens alone are not worth folding a batch, so its images are asked for their work, and the tower is measured."""
    monkeypatch.setattr("flexpatch.folding.gains", lambda config, counts, columns, dtype, *works: len(works) > 0)


class Weights(OrderedDict[str, Any]):
    """Stands in for the dict that DeepSpeed gives a module."""

    def __init__(self, weights: dict[str, Any], note: Callable[[str], None]) -> None:
        super().__init__(weights)
        self.note = note

    def __getitem__(self, name: str) -> Any:
        if (found := super().__getitem__(name)) is not None:
            self.note(name)
        return found


def watch(model: nn.Module) -> set[Read]:
    """What will be read in forwards of other modules."""
    running: list[str] = []
    reads: set[Read] = set()

    def watch_module(owner: str, module: nn.Module) -> None:
        def note(name: str) -> None:
            if running and running[-1] != owner:
                reads.add((running[-1], owner, name))

        module._parameters = Weights(module._parameters, note)  # type: ignore[assignment]
        module.register_forward_pre_hook(lambda *_: running.append(owner))
        module.register_forward_hook(lambda *_: running.__delitem__(-1))

    for name, module in model.named_modules():
        watch_module(name, module)
    return reads


def reads_of(kind: str, lora: bool = False, patched: bool = True) -> set[Read]:
    """What a training call reads in forwards of other modules."""
    model: Any = tiny_model(kind).train()
    call = (
        padded_batch() if media_of(model.config) is None else call_of(kind, model.config, awkward(kind, model.config))
    )
    model = get_peft_model(model, LORA) if lora else model
    if patched:
        flexpatch.apply(model)
    reads = watch(model)
    model(**call).logits.sum().backward()
    if patched:
        saved = flexpatch.savings(model)
        assert (saved.folded, saved.images_run < saved.images) == (1, media_of(model.config) is not None)
    return reads


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl", "gemma3", "llava"])
def test_no_others_are_read(kind: str, lora: bool) -> None:
    assert reads_of(kind, lora) == reads_of(kind, lora, patched=False)


def test_reads_by_name_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the embeddings, for their device, and of a tower's convolution, for its size."""

    def device_of(inner: PreTrainedModel) -> torch.device:
        table: Any = inner.get_input_embeddings()
        device: torch.device = table.weight.device
        return device

    def measured(backbone: Any) -> towers.Tower | None:
        assert backbone.visual.patch_embed.proj.weight.numel() > 0
        return found(backbone)

    found = towers.measured
    monkeypatch.setattr("flexpatch.folding.device_of", device_of)
    monkeypatch.setattr(towers, "measured", measured)
    more = reads_of("qwen2_5_vl") - reads_of("qwen2_5_vl", patched=False)
    assert more == {
        ("", "model.language_model.embed_tokens", "weight"),
        ("", "model.visual.patch_embed.proj", "weight"),
    }


def test_the_size_of_a_tower_in_parts() -> None:
    """ZeRO-3 leaves empty tensors in the places of weights, with the whole ones' shapes beside them."""
    model: Any = tiny_model("qwen2_5_vl")
    whole = towers.measured(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    assert whole is not None and min(whole.blocks, whole.others, whole.patch, whole.width) > 0
    assert towers.measured(model) == whole
