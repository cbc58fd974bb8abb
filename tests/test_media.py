"""Batches with images, folded: log-probs and gradients of the unpatched model, which sees each sequence alone."""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.media import (
    FAST,
    KINDS,
    Pictured,
    apart,
    awkward,
    call_of,
    copied,
    drawn,
    gradients,
    logps,
    random_pictured,
    read_of,
    readable,
    separately,
    text,
    with_holes,
)
from helpers.needs import needs
from parameterized import parameterized
from torch import Tensor, nn
from transformers import AutoConfig

import flexpatch
from flexpatch import FlexpatchError, FlexpatchWarning, UnsupportedModelError, images, layouts, media, towers
from flexpatch.calls import LITTLE
from flexpatch.float64 import Float64
from flexpatch.layouts import Drawn, Grid, Media, Stacked, Unit, multimodal_types
from flexpatch.models import TINY, check_architecture, tiny_config, tiny_model, tiny_types, variants
from flexpatch.registry import FULL, SLIDING, adapter_for

pytestmark = needs("transformers", "5.17", "images fold from there on")

BOUND = 1e-10
# What a control must be off, in nats.
WRONG = 1e-2


@pytest.fixture(autouse=True)
def _fold_always(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_gains" in request.keywords:
        return
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


@pytest.fixture(autouse=True)
def _no_unfolded_batches() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlexpatchWarning)
        yield


def with_record(monkeypatch: pytest.MonkeyPatch, kind: str, **changes: Any) -> None:
    monkeypatch.setitem(layouts._media, kind, replace(multimodal_types()[kind], **changes))


def off(kind: str, pictured: Pictured | None = None, variant: int = 0) -> float:
    """How far a patched model's folded batch is off."""
    model, true = tiny_model(kind, variant), tiny_model(kind, variant)
    pictured = awkward(kind, model.config) if pictured is None else pictured
    call = call_of(kind, model.config, pictured)
    flexpatch.apply(model)
    with torch.no_grad(), Float64():
        found = apart(read_of(call, logps(model, call)), separately(kind, true, pictured))
    assert flexpatch.savings(model).folded == 1
    return found


def check_parity(kind: str, variant: int = 0, left: bool = False, backend: str = "auto") -> flexpatch.counts.Savings:
    model, true = tiny_model(kind, variant), tiny_model(kind, variant)
    pictured = awkward(kind, model.config)
    call = call_of(kind, model.config, pictured, left=left)
    flexpatch.apply(model, backend=backend)
    with Float64():
        ours, theirs = read_of(call, logps(model, call)), separately(kind, true, pictured)
    assert apart(ours, theirs) < BOUND
    for mine, own in zip(gradients(model, ours), gradients(true, theirs), strict=True):
        assert own.norm() > 0 and (mine - own).norm() / own.norm() < BOUND
    return flexpatch.savings(model)


@parameterized.expand([(kind,) for kind in FAST])
def test_log_probs_and_gradients(kind: str) -> None:
    saved = check_parity(kind)
    # The first image has four places, two of which are one: before it they begin alike.
    assert (saved.folded, saved.images, saved.images_run) == (1, 14, 6)
    assert "6 of 14 images run" in str(saved)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize(("kind", "variant"), [("gemma3", 0), ("qwen3_vl", 0), ("gemma4", 1), ("paligemma", 0)])
@pytest.mark.slow
def test_block_masks(kind: str, variant: int) -> None:
    """Two-way blocks, and positions of three axes, on the flex backend."""
    saved = check_parity(kind, variant, backend="flex")
    assert saved.folded == 1


@parameterized.expand([(kind, variant) for kind in KINDS for variant in range(len(variants(kind)))])
@pytest.mark.slow
def test_log_probs_and_gradients_of_all(kind: str, variant: int) -> None:
    for left in (False, True):
        saved = check_parity(kind, variant, left)
        assert saved.folded == 1 and saved.images_run <= saved.images / 2


@parameterized.expand([(kind,) for kind in FAST])
@torch.no_grad()
def test_calls_of_text(kind: str) -> None:
    model = tiny_model(kind)
    pictured = awkward(kind, model.config)
    begin = text(np.random.default_rng(0), 9)
    plain = Pictured([begin + each[-4:] for each in pictured.sequences], [[] for _ in pictured.sequences], [4] * 12)
    call = call_of(kind, model.config, plain)
    before = read_of(call, logps(model, call))
    flexpatch.apply(model)
    assert apart(read_of(call, logps(model, call)), before) < 1e-7  # norms round to float32
    saved = flexpatch.savings(model)
    assert (saved.folded, saved.images) == (1, 0)


@parameterized.expand([(kind,) for kind in KINDS])
@pytest.mark.slow
def test_random_batches(kind: str) -> None:
    """A thousand over all classes. Some with holes run as given: over states, and in blocks."""
    warnings.simplefilter("ignore", FlexpatchWarning)
    models = [(tiny_model(kind, v), tiny_model(kind, v)) for v in range(len(variants(kind)))]
    for model, _ in models:
        flexpatch.apply(model)
    for seed in range(-(-1000 // len(KINDS))):
        model, true = models[seed % len(models)]
        rng = np.random.default_rng(seed)
        pictured = random_pictured(kind, model.config, rng)
        call = call_of(kind, model.config, pictured, left=bool(rng.random() < 0.5))
        with torch.no_grad(), Float64():
            found = read_of(call, logps(model, call))
            assert apart(found, separately(kind, true, pictured)) < BOUND, f"seed {seed}"
            if rng.random() < 0.3:
                call = with_holes(rng, call)
                found, own = logps(model, call), logps(true, call)
                read = readable(call["attention_mask"])
                assert (found - own)[read].abs().max() < BOUND, f"seed {seed}, holes"
    assert flexpatch.savings(model).folded > 0.7 * flexpatch.savings(model).batches


@pytest.mark.parametrize("kind", FAST)
def test_images_taken_as_equal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(held: Any, units: list[Unit], prints: Any) -> np.ndarray:
        return np.array([[unit.tokens for unit in units].index(unit.tokens) for unit in units])

    monkeypatch.setattr(media, "identities", equal)
    assert off(kind) > WRONG


@pytest.mark.parametrize(("kind", "variant"), [("gemma3", 0), ("gemma4", 1), ("gemma4_unified", 1), ("paligemma", 0)])
def test_blocks_dropped(kind: str, variant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_record(monkeypatch, kind, block_layers=())
    assert off(kind, variant=variant) > WRONG


@pytest.mark.parametrize(
    ("kind", "variant", "layers"),
    [
        ("gemma3", 0, (SLIDING,)),
        ("gemma3", 0, (FULL,)),
        ("gemma4", 1, (FULL, SLIDING)),
        ("gemma4_unified", 1, (SLIDING,)),
    ],
)
def test_blocks_in_other_layers(
    kind: str, variant: int, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_record(monkeypatch, kind, block_layers=layers)
    assert off(kind, variant=variant) > WRONG


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_one_axis(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_record(monkeypatch, kind, three_axes=False)
    assert off(kind) > WRONG


class TestIdentity:
    """Two images are one if all numbers of all their tensors are equal."""

    def of(self, *tensors: dict[str, Tensor]) -> list[int]:
        names = tuple(tensors[0])
        together = {name: torch.cat([each[name] for each in tensors]) for name in names}
        held = images.Held(Stacked(names=names), together)
        prints, *_ = held.read(each.numpy() for each in held.numbers())
        units = [Unit(1, dict.fromkeys(names, (k, k + 1))) for k in range(len(tensors))]
        return images.identities(held, units, prints).tolist()

    @parameterized.expand(
        [(torch.float64,), (torch.float32,), (torch.bfloat16,), (torch.uint8,), (torch.int64,), (torch.bool,)]
    )
    def test_of_every_dtype(self, dtype: torch.dtype) -> None:
        one = (torch.arange(1.0, 16).reshape(1, 3, 5) % 4).to(dtype)
        other = one.clone()
        other[0, 2, 4] = 0
        assert self.of(dict(p=one), dict(p=other), dict(p=one.clone()), dict(p=other.clone())) == [0, 1, 0, 1]

    def test_of_equal_fingerprints(self) -> None:
        """The same numbers in another order have the same sum."""
        one = torch.randn(1, 3, 4, 4, dtype=torch.float64)
        other = one.flip(-1)
        assert torch.equal(images.fingerprints(one), images.fingerprints(other))
        assert self.of(dict(p=one), dict(p=other), dict(p=one)) == [0, 1, 0]

    def test_of_every_tensor(self) -> None:
        one, size = torch.randn(1, 3, 4, 4), torch.tensor([[2, 4]])
        assert self.of(dict(p=one, size=size), dict(p=one, size=size.flip(1)), dict(p=one, size=size)) == [0, 1, 0]

    def test_of_what_is_not_a_number(self) -> None:
        """Equal to nothing: it is run as often as it comes."""
        one = torch.full((1, 3), float("nan"))
        assert self.of(dict(p=one), dict(p=one)) == [0, 1]

    def test_of_the_same_pixels_at_another_size(self) -> None:
        model = tiny_model("qwen2_5_vl")
        wide = drawn("qwen2_5_vl", model.config, [0])[0]
        tall = copied(wide)
        tall.tensors["image_grid_thw"][0, 1:] = wide.tensors["image_grid_thw"][0, 1:].flip(0)
        pictured = Pictured([[*wide.tokens, 9, 8, end] for end in (7, 6, 7, 6)], [[wide], [tall]] * 2, [2] * 4)
        assert off("qwen2_5_vl", pictured) < BOUND

    def test_of_a_view_that_begins_anywhere(self) -> None:
        """64 bits at a time are summed only where they begin at a multiple of 64."""
        pixels = torch.arange(25, dtype=torch.int16)[1:].view(2, 12)
        first, second = pixels.unbind()
        assert self.of(dict(p=pixels[:1]), dict(p=first[None].clone()), dict(p=second[None])) == [0, 0, 2]
        assert images.fingerprints(pixels).tolist() == [sum(range(1, 13)), sum(range(13, 25))]


class TestCalls:
    def folded(self, kind: str = "qwen2_5_vl") -> tuple[nn.Module, Pictured, dict[str, Any]]:
        model = flexpatch.apply(tiny_model(kind))
        pictured = awkward(kind, model.config)
        return model, pictured, call_of(kind, model.config, pictured)

    def reasons(self, model: nn.Module) -> list[str]:
        return list(flexpatch.savings(model).reasons)

    @parameterized.expand([(kind,) for kind in FAST])
    def test_truncated_images_raise_the_models_own_error(self, kind: str) -> None:
        model, _, call = self.folded(kind)
        token = model.config.image_token_id
        last = (call["input_ids"] == token).nonzero()[-1]
        call["input_ids"][last[0], last[1]] = 9
        with pytest.raises(
            Exception, match=r"Image features and image tokens do not match|not divisible by patch_size"
        ) as own:
            logps(tiny_model(kind), call)
        with (
            pytest.warns(FlexpatchWarning, match="whose images do not match their placeholders run as they are given"),
            pytest.raises(type(own.value)) as ours,
        ):
            logps(model, call)
        assert str(ours.value) == str(own.value)
        assert self.reasons(model) == ["whose images do not match their placeholders"]

    @parameterized.expand([(float("nan"),), (float("inf"),)])
    @torch.no_grad()
    def test_pixels_that_are_not_finite(self, number: float) -> None:
        """They spread in a row, where masks hide them by weights of zero. Folded before, the call is told apart."""
        model, _, call = self.folded("llava")
        logps(model, call)
        call["pixel_values"][2, 0, 0, 0] = number
        with pytest.warns(FlexpatchWarning, match="pixels that are NaN or infinite"):
            ours = logps(model, call)
        assert torch.equal(ours.nan_to_num(1.0), logps(tiny_model("llava"), call).nan_to_num(1.0))
        assert len(self.reasons(model)) == 1 and 0 < ours.isnan().float().mean() < 0.3

    def test_pixels_with_gradients_run_as_given(self) -> None:
        model, _, call = self.folded("llava")
        call["pixel_values"].requires_grad_()
        with pytest.warns(FlexpatchWarning, match="with pixel_values that get gradients of their own run as they are"):
            logps(model, call).sum().backward()
        assert call["pixel_values"].grad.abs().sum() > 0

    @parameterized.expand([("pixel_values_videos", "video"), ("input_features", "sound")])
    def test_media_of_other_kinds_run_as_given(self, name: str, reason: str) -> None:
        model, _, call = self.folded("llava")
        call[name] = torch.zeros(1)
        with pytest.warns(FlexpatchWarning, match=f"batches with {reason} run as they are given"):
            assert torch.equal(logps(model, call), logps(tiny_model("llava"), call))
        assert self.reasons(model) == [f"with {reason}"]

    def test_types_that_tell_equal_tokens_apart(self) -> None:
        model, _, call = self.folded("gemma3")
        call["token_type_ids"][0, 0] = 2
        with pytest.warns(FlexpatchWarning, match="whose equal tokens are of different types run as they are given"):
            assert torch.equal(logps(model, call), logps(tiny_model("gemma3"), call))

    def test_padding_within_a_block(self) -> None:
        model, _, call = self.folded("gemma3")
        call["token_type_ids"][5, 1:4] = 1
        call["attention_mask"][5, 2] = 0
        with pytest.warns(FlexpatchWarning, match="two-way blocks that padding or other tokens interrupt"):
            assert torch.equal(logps(model, call), logps(tiny_model("gemma3"), call))

    def test_batch_norms_in_training(self) -> None:
        record, tower = multimodal_types()["llava"], nn.Sequential(nn.BatchNorm2d(3))
        call = dict(pixel_values=torch.zeros(1, 3, 2, 2))
        assert "BatchNorm in training" in (images.media_obstacle(record, tower, call) or "")
        assert images.media_obstacle(record, tower.eval(), call) is None

    def test_older_releases_run_as_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, _, call = self.folded("llava")
        with_record(monkeypatch, "llava", since="99.0")
        with pytest.warns(FlexpatchWarning, match="with images, in transformers before 99.0"):
            logps(model, call)

    def test_the_next_call_finds_the_fold_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the images are equal too; nothing of an image is kept."""
        model, _, call = self.folded("llava")
        with torch.no_grad():
            first = logps(model, call)
            monkeypatch.setattr("flexpatch.folding.fold_batch", None)
            assert torch.equal(logps(model, call), first)
            other = call | dict(pixel_values=call["pixel_values"] * 2)
            second = logps(model, other)  # other pixels, but the same images are equal
            assert not torch.equal(second, first)
            call["pixel_values"][1] += 1
            with pytest.raises(TypeError, match="not callable"):
                logps(model, call)

    @torch.no_grad()
    def test_generation_after_a_folded_call(self) -> None:
        model, pictured, call = self.folded("qwen2_5_vl")
        plain = tiny_model("qwen2_5_vl")
        for each in (model, plain):
            logps(each, call)
        assert torch.equal(model.model.rope_deltas, plain.model.rope_deltas)
        prompt = call_of("qwen2_5_vl", model.config, pictured.only(0))
        del prompt["use_cache"]
        ours, theirs = (m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (model, plain))
        assert torch.equal(ours, theirs)

    def test_an_image_in_two_rows_runs_as_given(self) -> None:
        """Its placeholders add up over the batch alone: the model takes them as they come."""
        model, _, _ = self.folded("llava")
        ids = torch.tensor([[149, 149, 149, 5, 6, 7], [149, 149, 149, 149, 149, 6], [3, 4, 5, 6, 7, 8]])
        call = dict(input_ids=ids, pixel_values=torch.randn(2, 3, 28, 28, dtype=torch.float64), use_cache=False)
        with pytest.warns(FlexpatchWarning, match="whose images do not match their placeholders"):
            assert torch.equal(logps(model, call), logps(tiny_model("llava"), call))

    @torch.no_grad()
    def test_images_of_several_sizes_that_fill_as_many_in_sum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Taken for equally long, as those of other towers are, LLaVA's with Pixtral's tower would change places."""
        config = tiny_model("llava", 1).config
        wide, tall, small, other = drawn("llava", config, (0, 1, 2, 2))
        bare = [image._replace(tokens=[149] * image.tokens.count(149)) for image in (wide, tall, small, other)]
        pairs = [(2, 0), (2, 1), (0, 3), (0, 2)]
        pictured = Pictured(
            [[3, *bare[a].tokens, 4, *bare[b].tokens, 5 + n] for n, (a, b) in enumerate(pairs)],
            [[copied(bare[a]), copied(bare[b])] for a, b in pairs],
            [1] * 4,
        )
        assert off("llava", pictured, variant=1) < BOUND
        with_record(monkeypatch, "llava", images=Stacked(names=("pixel_values", "image_sizes")))
        assert off("llava", pictured, variant=1) > WRONG

    def test_images_that_end_differently(self) -> None:
        """Tokens between the lines of an image are part of it."""
        config = tiny_model("mistral3").config
        image = drawn("mistral3", config, [1])[0]
        odd = Drawn(image.tensors, [8 if token == 5 else token for token in image.tokens])
        ends = [[9, 8, 7], [9, 8, 6]]
        pictured = Pictured(
            [each.tokens + end for each in (image, odd) for end in ends], [[image], [image], [odd], [odd]], [3] * 4
        )
        assert off("mistral3", pictured) < BOUND

    @parameterized.expand([("qwen2_5_vl",), ("qwen3_vl",)])
    def test_videos(self, kind: str) -> None:
        model, plain = flexpatch.apply(tiny_model(kind)), tiny_model(kind)
        image = drawn(kind, model.config, [0])[0]
        rng = np.random.default_rng(0)
        frames = 1 if kind == "qwen3_vl" else 2  # frames of Qwen3-VL have timestamps between them
        grid = torch.tensor([[frames, 4, 4]])
        pixels = [torch.from_numpy(rng.standard_normal((16 * frames, 96))) for _ in range(2)]
        film = [146] * (4 * frames)
        starts = [[3, 148, *film, 147, *image.tokens, 4], [3, 148, *film, 147, 4]]
        ids = [start + text(rng, 3) for start in starts for _ in range(2)]
        S = max(map(len, ids))
        mask = torch.tensor([[1] * len(each) + [0] * (S - len(each)) for each in ids])
        padded = torch.tensor([each + [0] * (S - len(each)) for each in ids])
        types = (padded == 149).long() + 2 * (padded == 146).long()
        call = dict(
            input_ids=padded, attention_mask=mask, mm_token_type_ids=types, use_cache=False,
            pixel_values=torch.cat([image.tensors["pixel_values"]] * 2),
            image_grid_thw=torch.cat([image.tensors["image_grid_thw"]] * 2),
            pixel_values_videos=torch.cat([pixels[0], pixels[0], pixels[1], pixels[1]]),
            video_grid_thw=torch.cat([grid] * 4),
        )  # fmt: skip
        with torch.no_grad(), Float64():
            ours, theirs = (read_of(call, logps(m, call)) for m in (model, plain))
        assert apart(ours, theirs) < BOUND
        saved = flexpatch.savings(model)
        assert (saved.folded, saved.images, saved.images_run) == (1, 6, 3)


@pytest.mark.real_gains
@torch.no_grad()
def test_work_of_the_tower_is_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense row of this pair computes almost as many tokens and pairs as its batch, but its image is run once."""
    model = flexpatch.apply(tiny_model("llava"))
    one, other = drawn("llava", model.config, [0, 0])
    answers = [text(np.random.default_rng(n), 12) for n in range(2)]

    def reasons(*shown: Drawn) -> dict[str, int]:
        flexpatch.remove(model)
        flexpatch.apply(model)
        each = zip(shown, answers, strict=True)
        pictured = Pictured([image.tokens + answer for image, answer in each], [[image] for image in shown], [12] * 2)
        logps(model, call_of("llava", model.config, pictured))
        return dict(flexpatch.savings(model).reasons)

    assert reasons(one, copied(one)) == {}
    assert reasons(one, other) == {LITTLE: 1}
    monkeypatch.setattr(towers, "measured", lambda backbone: None)
    assert reasons(one, copied(one)) == {LITTLE: 1}


@parameterized.expand([("llava_next",), ("llava_onevision",)])
def test_tokens_of_tiled_images(kind: str) -> None:
    """They are counted as the model counts them: from sizes alone, for any size."""
    model = tiny_model(kind, len(variants(kind)) - 1)
    source = importlib.import_module(type(model).__module__)
    config, side = model.config, model.config.vision_config.image_size
    count = multimodal_types()[kind].images.tokens
    assert count is not None
    rng = np.random.default_rng(0)
    for size in rng.integers(3, 200, (300, 2)):
        tiles = source.image_size_to_num_patches(size, config.image_grid_pinpoints, side)
        features = torch.zeros(tiles, (side // config.vision_config.patch_size) ** 2, 64)
        options: dict[str, Any] = dict(image_newline=torch.zeros(64))
        if kind == "llava_next":
            options["vision_feature_select_strategy"] = "default"
        else:
            options["vision_aspect_ratio"] = config.vision_aspect_ratio
        _, lengths = model.model.pack_image_features([features], torch.from_numpy(size)[None], **options)
        assert count(config, size) == lengths.item(), size


def test_paligemma_without_types_runs_as_given() -> None:
    model = flexpatch.apply(tiny_model("paligemma"))
    call = call_of("paligemma", model.config, awkward("paligemma", model.config))
    del call["token_type_ids"]
    with pytest.warns(FlexpatchWarning, match="with no token_type_ids, which tell prompts from answers run as they"):
        assert torch.equal(logps(model, call), logps(tiny_model("paligemma"), call))


@torch.no_grad()
def test_paligemma_counts_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From elsewhere rope, which is float32, would round otherwise."""
    model, true = flexpatch.apply(tiny_model("paligemma")), tiny_model("paligemma")
    pictured = awkward("paligemma", model.config)
    call, own = call_of("paligemma", model.config, pictured), separately("paligemma", true, pictured)
    assert apart(read_of(call, logps(model, call)), own) < BOUND
    with_record(monkeypatch, "paligemma", first_position=0)
    assert apart(read_of(call, logps(model, call)), own) > 100 * BOUND


def test_paligemma_2_is_refused() -> None:
    settings = dict(tiny_config("paligemma").to_dict(), text_config=dict(TINY, model_type="gemma2"))
    with pytest.raises(UnsupportedModelError, match="PaliGemma 2 takes no masks by layer type"):
        adapter_for(AutoConfig.for_model(**settings))
    text = tiny_config("paligemma").get_text_config()
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention=True lets a prompt see its answer"):
        adapter_for(text)


def test_gemma_3n() -> None:
    pytest.importorskip("timm")
    saved = check_parity("gemma3n")
    assert (saved.folded, saved.images, saved.images_run) == (1, 14, 6)


def test_packages_that_a_class_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them there are no tiny models, and verifying says what to install."""
    assert "llava" in tiny_types()
    with_record(monkeypatch, "llava", needs=("nobody_has_this",))
    assert "llava" not in tiny_types()
    with pytest.raises(FlexpatchError, match="model type 'llava' needs nobody_has_this: pip install nobody_has_this"):
        check_architecture("llava")


def test_blocks_longer_than_a_window_run_as_given() -> None:
    """Where windows do not cut them, a row's rule would."""
    model = tiny_model("gemma4_unified", 1)
    image = drawn("gemma4_unified", model.config, [0])[0]
    row = [148, *[149] * 12, 147]
    pictured = Pictured([[3, *row, 4, end] for end in (5, 6)], [[image] * 3] * 2, [1, 1])
    flexpatch.apply(model)
    call = call_of("gemma4_unified", model.config, pictured)
    with pytest.warns(FlexpatchWarning, match="with two-way blocks longer than a window of 8"):
        assert torch.equal(logps(model, call), logps(tiny_model("gemma4_unified", 1), call))


def test_several_images_of_onevision_run_as_given() -> None:
    model, plain = flexpatch.apply(tiny_model("llava_onevision")), tiny_model("llava_onevision")
    pictured = awkward("llava_onevision", model.config).only(0, 1, 6, 7)
    call = call_of("llava_onevision", model.config, pictured) | dict(batch_num_images=torch.ones(4, dtype=torch.long))
    with torch.no_grad(), Float64():
        assert apart(*(read_of(call, logps(each, call)) for each in (model, plain))) < BOUND
    assert flexpatch.savings(model).folded == 1
    call["batch_num_images"] = torch.tensor([1, 1, 2, 2])
    with (
        pytest.warns(FlexpatchWarning, match="with several images in a prompt"),
        pytest.raises(ValueError, match="Image features and image tokens do not match"),
    ):
        logps(model, call)


def test_records_name_each_type_once() -> None:
    record = multimodal_types()["llava"]
    with pytest.raises(FlexpatchError, match="images of model type 'llava' are already served by LLaVA"):
        layouts.register_media(Media(name="Other", tiny=record.tiny, images=Grid(), draw=record.draw))
