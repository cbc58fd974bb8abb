"""Batches with videos of every class that declares them: log-probs and gradients of separate, unpatched sequences."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.media import KINDS, apart, copied, drawn, gradients, logps, read_of, text
from helpers.needs import needs
from parameterized import parameterized

import flexpatch
from flexpatch import media
from flexpatch.float64 import Float64
from flexpatch.layouts import Drawn, Unit, multimodal_types
from flexpatch.models import tiny_model
from flexpatch.pictures import together

pytestmark = needs("transformers", "5.17", "images fold from there on")

BOUND = 1e-10
WRONG = 1e-2
FILMED = [kind for kind in KINDS if multimodal_types()[kind].videos is not None]
# Frames with text between them, frames behind each other, and frames that are pooled to one.
TIMED = {"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v"}
POOLED = {"kimi_k25"}
# Its videos fill placeholders of images, so that no call has both.
SAME_TOKEN = {"glm4v"}


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


def film(kind: str, config: Any, frames: int, number: int, seed: int) -> Drawn:
    """A video of random frames."""
    image = drawn(kind, config, [number], seed)[0]
    layout = multimodal_types()[kind].videos
    assert layout is not None
    token, each = getattr(config, layout.token), image.tokens.count(config.image_token_id)
    pixels, grid = image.tensors["pixel_values"], image.tensors["image_grid_thw"].clone()
    grid[0, 0] = frames
    generator = torch.Generator().manual_seed(seed)
    moving = torch.randn(frames * len(pixels), *pixels.shape[1:], dtype=torch.float64, generator=generator)
    ids = [token] * each * (1 if kind in POOLED else frames)
    if kind in TIMED:
        ids = [id for frame in range(frames) for id in (*text(np.random.default_rng(frame), 2), *[token] * each, 6)]
    return Drawn(dict(zip(layout.names, (moving, grid), strict=True)), [6, *ids, 5])


def batch_of(kind: str, config: Any, sequences: list[list[Any]], left: bool = False) -> dict[str, Any]:
    """The call of sequences of token ids, images and videos."""
    record = multimodal_types()[kind]
    ids = [[id for part in parts for id in (part.tokens if isinstance(part, Drawn) else part)] for parts in sequences]
    S = max(map(len, ids))
    padded, mask = torch.zeros(len(ids), S, dtype=torch.long), torch.zeros(len(ids), S, dtype=torch.long)
    for row, seen, each in zip(padded, mask, ids, strict=True):
        at = slice(S - len(each), S) if left else slice(len(each))
        row[at], seen[at] = torch.tensor(each), 1
    call: dict[str, Any] = dict(input_ids=padded, attention_mask=mask, use_cache=False)
    shown = [[copied(part) for part in parts if isinstance(part, Drawn)] for parts in sequences]
    types = torch.zeros_like(padded)
    for number, layout in enumerate(record.layouts(), 1):
        own = [[each for each in parts if layout.names[0] in each.tensors] for parts in shown]
        call |= together(layout, own)
        types[padded == getattr(config, layout.token)] = number if any(own) or number == 1 else 0
    if record.types is not None:
        call[record.types] = types
    return call


def sequences_of(kind: str, config: Any) -> list[list[Any]]:
    """One video in two prompts, other pixels under equal text, two videos of other lengths, videos and images, none."""
    rng = np.random.default_rng(0)
    short, other, long = film(kind, config, 2, 0, 0), film(kind, config, 2, 0, 1), film(kind, config, 3, 1, 2)
    begin, question, end = (text(rng, length) for length in (2, 5, 3))
    prompts: list[list[Any]] = [
        [begin, short, question],
        [begin, other, question],
        [begin, short, question, long, end],
        [question, long, short, end],
        [question, end],
    ]
    if kind not in SAME_TOKEN:
        image = drawn(kind, config, [1])[0]
        prompts += [[begin, image, short, question], [begin, short, image, end]]
    return [[*parts, text(rng, 3)] for parts in prompts for _ in range(2)]


def off(kind: str, left: bool = False) -> tuple[float, float, flexpatch.counts.Savings]:
    """How far log-probs and gradients of a patched model's folded batch are off, and what was saved."""
    model, true = tiny_model(kind), tiny_model(kind)
    sequences = sequences_of(kind, model.config)
    call = batch_of(kind, model.config, sequences, left)
    flexpatch.apply(model)
    with Float64():
        ours = read_of(call, logps(model, call))
        theirs = [logps(true, batch_of(kind, true.config, [each]))[0] for each in sequences]
        found, own = gradients(model, ours), gradients(true, theirs)
    wrong = max(float((a - b).norm() / b.norm()) for a, b in zip(found, own, strict=True))
    return apart(ours, theirs), wrong, flexpatch.savings(model)


def check(kind: str, left: bool = False) -> None:
    logprobs, gradient, saved = off(kind, left)
    assert logprobs < BOUND and gradient < BOUND
    assert saved.folded == 1 and saved.images_run <= saved.images / 2


@parameterized.expand([(kind,) for kind in FILMED[:1]], skip_on_empty=True)
def test_videos(kind: str) -> None:
    check(kind)


@parameterized.expand([(kind,) for kind in FILMED], skip_on_empty=True)
@pytest.mark.slow
def test_videos_of_all(kind: str) -> None:
    for left in (False, True):
        check(kind, left)


@pytest.mark.parametrize(
    "kind", [kind if kind in FILMED[:1] else pytest.param(kind, marks=pytest.mark.slow) for kind in FILMED]
)
def test_videos_taken_as_equal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(held: Any, units: list[Unit], prints: Any) -> np.ndarray:
        return np.array([[unit.tokens for unit in units].index(unit.tokens) for unit in units])

    monkeypatch.setattr(media, "identities", equal)
    logprobs, gradient, saved = off(kind)
    assert saved.folded == 1 and logprobs > WRONG and gradient > WRONG


@pytest.mark.skipif("glm4v" not in FILMED, reason="this release has no GLM-4V")
def test_videos_of_rows_with_the_placeholders_of_images() -> None:
    model = flexpatch.apply(tiny_model("glm4v"))
    shown = film("glm4v", model.config, 2, 0, 0)
    rows = flexpatch.build_rows([[flexpatch.Tree(shown.tokens, [flexpatch.Tree([7])], images=shown.tensors)]])
    with pytest.raises(flexpatch.UnsupportedModelError, match="videos of this model, whose placeholders are those of"):
        flexpatch.model_inputs(model, rows)


@pytest.mark.skipif("qwen2_5_vl" not in FILMED, reason="this release has no Qwen2.5-VL")
@torch.no_grad()
def test_seconds_of_frames_in_rows() -> None:
    """They move rope positions: of separate sequences, and of rows."""
    model = tiny_model("qwen2_5_vl")

    def trees(*seconds: float) -> list[flexpatch.Tree]:
        found = []
        for number, each in enumerate(seconds):
            shown = film("qwen2_5_vl", model.config, 3, 0, number)
            tensors = {**shown.tensors, "second_per_grid_ts": torch.tensor([each])}
            answers = [flexpatch.Tree(text(np.random.default_rng(k), 4)) for k in range(2)]
            found.append(flexpatch.Tree([5, *shown.tokens, 9], answers, images=tensors))
        return found

    with Float64():
        right, wrong = (flexpatch.separate_logprobs(model, trees(*each)).tokens for each in ((0.5, 4.0), (4.0, 0.5)))
        flexpatch.apply(model)
        ours = flexpatch.answer_logprobs(model, flexpatch.build_rows([trees(0.5, 4.0)])).tokens
    assert (ours - right).abs().max() < BOUND and (wrong - right).abs().max() > WRONG
    first, second = trees(0.5, 4.0)
    bare = replace(second, images={k: x for k, x in (second.images or {}).items() if k != "second_per_grid_ts"})
    long = replace(second, images={**(second.images or {}), "second_per_grid_ts": torch.ones(2)})
    for tree, message in (
        (bare, "has second_per_grid_ts, and sample 1"),
        (long, "one number for each of its 1 videos"),
    ):
        with pytest.raises(flexpatch.FlexpatchError, match=message):
            flexpatch.model_inputs(model, flexpatch.build_rows([[first, tree]]))
