"""Rows of your own with images: trees, dataset rows through a processor, wrong use, and the verifier."""

import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import processors_offline as offline
from helpers.media import KINDS, drawn, text
from helpers.needs import needs
from parameterized import parameterized
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

import flexpatch
from flexpatch import Collator, FlexpatchError, Rows, Tree, UnsupportedModelError, answer_logprobs, build_rows, lay_out
from flexpatch import images as same_images
from flexpatch.float64 import Float64
from flexpatch.internals import pretrained
from flexpatch.layouts import Drawn, multimodal_types
from flexpatch.logprobs import separate_logprobs
from flexpatch.models import tiny_model, variants
from flexpatch.parity import check_parity
from flexpatch.picture_checks import plain_ids
from flexpatch.pictures import together
from flexpatch.reference import reference_logprobs
from flexpatch.row_images import set_shown, shown_with

pytestmark = needs("transformers", "5.17", "images fold from there on")

BOUND = 1e-10
WRONG = 1e-2
# Blocks and a window; nested; sizes of images; rope of three axes.
FAST = ["gemma3", "smolvlm", "mistral3", "qwen3_vl"]


def shown(kind: str, *images: Drawn) -> dict[str, Tensor] | None:
    return together(multimodal_types()[kind].images, [images]) or None


def run(kind: str, *parts: Any, children: Any = (), answer: bool | None = None) -> Tree:
    """A tree whose run is made of token ids and images."""
    ids = [token for part in parts for token in (part.tokens if isinstance(part, Drawn) else part)]
    images = shown(kind, *(part for part in parts if isinstance(part, Drawn)))
    return Tree(ids, children, answer, images)


def trees_of(kind: str, config: Any) -> list[Tree]:
    """One image, two images, images below the root of which two are alike, an answer before the next image, none."""
    rng = np.random.default_rng(0)
    first, second, other = drawn(kind, config, (0, 1, 0))
    begin, question, alike = text(rng, 5), text(rng, 4), text(rng, 2)

    def answers(*lengths: int) -> list[Tree]:
        return [Tree(alike + text(rng, length)) for length in lengths]

    found = [
        run(kind, begin, first, question, children=answers(4, 2)),
        run(kind, begin, first, question, second, begin, children=answers(3, 0, 5)),
        Tree.of(begin, question, alike + begin),
    ]
    if multimodal_types()[kind].text_blocks:
        return found
    asked = [run(kind, image, question, children=answers(3, 1), answer=False) for image in (first, other, first)]
    again = [run(kind, question, second, children=answers(2, 4), answer=False)]
    return [*found, Tree(begin, asked), run(kind, first, begin, children=[Tree(alike, again, answer=True)])]


def separately(model: nn.Module, trees: list[Tree]) -> Tensor:
    return separate_logprobs(model, trees, batch_size=1).tokens


def weighted(tokens: Tensor) -> Tensor:
    return (tokens * torch.randn(len(tokens), generator=torch.Generator().manual_seed(1), dtype=tokens.dtype)).sum()


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weighted(tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off(model: nn.Module, rows: Rows, true: Tensor) -> float:
    with torch.no_grad(), Float64():
        return float((answer_logprobs(model, rows).tokens - true).abs().max())


def check_rows(kind: str, variant: int = 0) -> None:
    model = tiny_model(kind, variant)
    trees = trees_of(kind, model.config)
    with Float64():
        true = separately(model, trees)
        own = gradients(model, true)
        flexpatch.apply(model)
        rows = build_rows([trees])
        ours = answer_logprobs(model, rows).tokens
        assert (ours - true).abs().max() < BOUND
        found = gradients(model, ours)
    assert found.keys() == own.keys()
    for part in (True, False):  # the text model, and the tower with what projects its output
        names = [n for n in own if ("language_model" in n or "text_model" in n or "lm_head" in n) == part]
        norm = torch.cat([own[n].flatten() for n in names]).norm()
        assert norm > 0 and torch.cat([(found[n] - own[n]).flatten() for n in names]).norm() < BOUND * norm
    padded = pickle.loads(pickle.dumps(build_rows([trees[1:], trees[:1]]))).to("cpu")
    order = torch.cat([torch.arange(len(lay_out(trees[0]).targets), len(true)), torch.arange(len(true))])[: len(true)]
    assert off(model, padded, true[order]) < BOUND


@parameterized.expand([(kind,) for kind in FAST])
def test_rows(kind: str) -> None:
    check_rows(kind)


@parameterized.expand([(kind, variant) for kind in KINDS for variant in range(len(variants(kind)))])
@pytest.mark.slow
def test_rows_of_all(kind: str, variant: int) -> None:
    check_rows(kind, variant)


def random_tree(kind: str, pool: list[Drawn], words: list[list[int]], rng: np.random.Generator, depth: int = 0) -> Tree:
    """Runs that often come again, with images anywhere but in answers, and answers before images."""
    flat = multimodal_types()[kind].text_blocks
    parts: list[Any] = [words[rng.integers(3)]]
    for _ in range(rng.choice([0, 1, 2]) if depth == 0 or not flat else 0):
        parts += [pool[rng.integers(3)], words[rng.integers(3)]]
    children = []
    for _ in range(rng.integers(1, 4)):
        deeper = depth < 2 and not flat and rng.random() < 0.4
        if deeper:
            children.append(random_tree(kind, pool, words, rng, depth + 1))
        else:
            children.append(Tree(words[rng.integers(3)] * int(rng.random() < 0.5) + text(rng, int(rng.integers(1, 5)))))
    return run(kind, *parts, children=children, answer=False)


@parameterized.expand([(kind,) for kind in KINDS])
@pytest.mark.slow
def test_random_trees(kind: str) -> None:
    models = [tiny_model(kind, variant) for variant in range(len(variants(kind)))]
    for seed in range(12):
        rng, model = np.random.default_rng(seed), models[seed % len(models)]
        pool = drawn(kind, model.config, rng.integers(0, 3, 3).tolist(), seed)
        words = [text(rng, int(rng.integers(1, 5))) for _ in range(3)]
        trees = [random_tree(kind, pool, words, rng) for _ in range(rng.integers(1, 4))]
        flexpatch.remove(model)
        with torch.no_grad(), Float64():
            true = separately(model, trees)
        flexpatch.apply(model)
        bins = [trees[:1], trees[1:]] if len(trees) > 1 and rng.random() < 0.5 else [trees]
        assert off(model, build_rows(bins), true) < BOUND, f"seed {seed}"


@parameterized.expand([("qwen3_vl", "position_ids"), ("gemma3", "last"), ("smolvlm", "images")])
def test_controls(kind: str, wrong: str) -> None:
    model = tiny_model(kind)
    trees = trees_of(kind, model.config)
    with torch.no_grad(), Float64():
        true = separately(model, trees)
    rows, inner = build_rows([trees]), pretrained(flexpatch.apply(model))
    right = shown_with(inner, rows)
    assert off(model, rows, true) < BOUND
    if wrong == "images":
        pixels = right.arguments["pixel_values"]
        broken = replace(right, arguments=right.arguments | dict(pixel_values=pixels[:, :1].expand_as(pixels)))
    elif wrong == "last":
        assert right.rows.last is not None
        broken = replace(right, rows=replace(right.rows, last=None))
    else:
        broken = replace(right, arguments={k: v for k, v in right.arguments.items() if k != wrong})
    assert off(model, set_shown(inner, replace(rows), broken), true) > WRONG


def test_each_image_once_and_in_order() -> None:
    model = tiny_model("qwen3_vl")
    first, second, other = drawn("qwen3_vl", model.config, (0, 1, 0))
    asked = [run("qwen3_vl", image, [7, 8], children=[Tree([9]), Tree([10])]) for image in (first, other, first)]
    rows = build_rows([[Tree([11], asked), run("qwen3_vl", second, [12], children=[Tree([13])])]])
    flexpatch.apply(model)
    inputs = flexpatch.model_inputs(model, rows)
    grids = inputs["image_grid_thw"].tolist()
    one, two = (image.tensors["image_grid_thw"][0].tolist() for image in (first, second))
    assert grids == [one, one, two] and len(rows.images) == 3
    assert inputs["pixel_values"].dtype == torch.float64
    assert inputs["position_ids"].shape == (3, *rows.input_ids.shape)
    assert vars(model.model).get("rope_deltas") is None, "generation finds what its own calls left"
    assert flexpatch.model_inputs(model, rows)["pixel_values"] is inputs["pixel_values"], "found once"


def test_rows_go_to_devices_and_dtypes() -> None:
    model = tiny_model("llava", dtype=torch.bfloat16)
    rows = build_rows([trees_of("llava", model.config)])
    assert {tensor.device.type for each in rows.to("meta").images for tensor in each.tensors.values()} == {"meta"}
    flexpatch.apply(model)
    assert flexpatch.model_inputs(model, rows)["pixel_values"].dtype == torch.bfloat16
    assert answer_logprobs(model, rows).answers.isfinite().all()


def test_reference_and_its_cache(tmp_path: Path) -> None:
    model = flexpatch.apply(tiny_model("llava"))
    trees = trees_of("llava", model.config)
    first = reference_logprobs(model, trees, capacity=200, cache_dir=tmp_path)
    with torch.no_grad():
        own = answer_logprobs(model, build_rows([trees])).answers
    assert (torch.cat(first) - own).abs().max() < 1e-3
    pixels = {"pixel_values": trees[0].images["pixel_values"] + 1}  # type: ignore[index]
    reference_logprobs(model, [replace(trees[0], images=pixels), *trees[1:]], capacity=200, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "other pixels, other log-probs"


# --- wrong use ----------------------------------------------------------------------------------------------------


def wrong_trees(kind: str) -> dict[str, Tree]:
    first, second = drawn(kind, tiny_model(kind).config, (0, 1))
    good, two = run(kind, [7], first, [8], children=[Tree([9])]), shown(kind, first, second)
    assert good.images is not None
    return {
        "sample 0: the prompt: its 2 images fill": replace(good, images=two),
        "sample 0: image placeholders .* in a run that has no images": replace(good, images=None),
        "sample 0: the prompt: its 1 images fill 6 placeholders, and its text holds 2": replace(good, ids=good.ids[:4]),
        "sample 0: the prompt has images\\['sound'\\], which the model does not take": replace(
            good, images={**good.images, "sound": torch.ones(1)}
        ),
        "sample 0: the prompt: its pixels are NaN or infinite": replace(
            good, images={**good.images, "pixel_values": good.images["pixel_values"] / 0}
        ),
        "do not fit each other: pixel_values": replace(good, images=dict(pixel_values=good.images["pixel_values"])),
        "sample 0: the prompt has list as images": replace(good, images=[1]),  # type: ignore[arg-type]
        "sample 0: the prompt has list as images\\['pixel_values'\\]": replace(good, images=dict(pixel_values=[1])),
        "no tensor among its images": replace(good, images={}),
    }


@parameterized.expand(list(wrong_trees("qwen3_vl").items()))
def test_wrong_trees(message: str, tree: Tree) -> None:
    model = flexpatch.apply(tiny_model("qwen3_vl"))
    good = run("qwen3_vl", *drawn("qwen3_vl", model.config, (0,)), [8], children=[Tree([9])])
    with pytest.raises(FlexpatchError, match=message):
        flexpatch.model_inputs(model, build_rows([[tree, good]]))


def test_other_models_and_blocks() -> None:
    first, second = drawn("gemma3", tiny_model("gemma3").config, (0, 0))
    bare = [image._replace(tokens=[149] * 4) for image in (first, second)]
    below = [run("gemma3", bare[1], [8], children=[Tree([9])], answer=False), Tree([10])]
    with pytest.raises(FlexpatchError, match=r"two-way block of this model .* put all of it into one Tree"):
        flexpatch.model_inputs(
            flexpatch.apply(tiny_model("gemma3")), build_rows([[run("gemma3", [7], bare[0], children=below)]])
        )
    rows = build_rows([[run("gemma3", [7], first, children=[Tree([9])])]])
    with pytest.raises(FlexpatchError, match="sample 0: the prompt has images, and LlamaForCausalLM takes none"):
        flexpatch.model_inputs(flexpatch.apply(tiny_model("llama")), rows)
    model = tiny_model("llava_onevision")
    image = drawn("llava_onevision", model.config, (0,))[0]
    several = run("llava_onevision", image, [7], children=[Tree([9])])
    several = replace(several, images={**(several.images or {}), "batch_num_images": torch.tensor([2])})
    with pytest.raises(UnsupportedModelError, match="sample 0: the prompt: rows cannot run with several images"):
        flexpatch.model_inputs(flexpatch.apply(model), build_rows([[several]]))


def test_ids_outside_the_vocabulary() -> None:
    model = flexpatch.apply(tiny_model("gemma3"))
    model.config.image_token_id = 1000  # as in some checkpoints: placeholders are never looked up
    image = drawn("gemma3", model.config, (0,))[0]
    tree = run("gemma3", image, [7], children=[Tree([9])])
    assert answer_logprobs(model, build_rows([[tree]])).answers.isfinite()
    with torch.no_grad():
        assert (separately(model, [tree]) - answer_logprobs(model, build_rows([[tree]])).tokens).abs().max() < 1e-6
    with pytest.raises(FlexpatchError, match="sample 1: id 200 is outside the vocabulary"):
        trees = [run("gemma3", image, [200 if i else 7], children=[Tree([9])]) for i in (0, 1)]
        flexpatch.model_inputs(model, build_rows([trees]))


# --- dataset rows -------------------------------------------------------------------------------------------------


def messages(*texts: str) -> list[dict[str, Any]]:
    return [dict(role=("user", "assistant")[i % 2], content=each) for i, each in enumerate(texts)]


def said(content: str) -> list[dict[str, Any]]:
    return [dict(role="assistant", content=content)]


def dataset_rows() -> list[dict[str, Any]]:
    """One image, other pixels under equal text, several images, images among the parts, and none."""
    part = [dict(type="text", text="Left "), dict(type="image"), dict(type="text", text=" or right?")]
    return [
        dict(images=[offline.picture(0)], prompt=messages("What?"), chosen=said("A cat."), rejected=said("A big dog.")),
        dict(images=[offline.picture(1)], prompt=messages("What?"), chosen=said("No."), rejected=said("Nope.")),
        dict(
            images=[offline.picture(0), offline.picture(2, 24, 16)],
            prompt=messages("Which?", "Hm", "Say."), chosen=said("One."), rejected=said("Two."),
        ),
        dict(
            images=[offline.picture(3, 24, 16)],
            prompt=[dict(role="user", content=part)], chosen=said("Left."), rejected=said("Right."),
        ),
        dict(images=[], prompt=messages("Who?"), chosen=said("Me."), rejected=said("You.")),
    ]  # fmt: skip


@parameterized.expand([(kind,) for kind in offline.KINDS])
def test_dataset_rows_as_trl_reads_them(kind: str) -> None:
    processor, rows = offline.make_processor(kind), dataset_rows()
    batch = DataCollatorForVisionPreference(processor)(copy.deepcopy(rows))
    layouts = [Collator(processor).layout(row, i) for i, row in enumerate(rows)]
    record = multimodal_types()[kind].images
    for n, (ids, mask, scored) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"], strict=True)
    ):
        layout, answer = layouts[n % len(rows)], n // len(rows)
        path = layout.answers[answer]
        assert layout.ids[path].tolist() == ids[mask].tolist()
        assert layout.answer_lengths[answer] == scored.sum()
    own = build_rows([layouts]).images
    entries = record.entries(batch)
    for name, tensor in entries.items():
        filled = tensor[(tensor != 0).flatten(1).any(1)]  # images of zeros fill up sequences with fewer
        mine = torch.cat([record.entries(each.given)[name] for each in own])
        assert torch.equal(torch.cat([mine, mine]), filled)


@parameterized.expand([kind for kind in offline.MADE if kind != "paligemma"])
@pytest.mark.slow
def test_dataset_rows_of_every_class(kind: str) -> None:
    """Against the unpatched model, which sees each answer alone, as TRL's collator makes it."""
    processor, model = offline.make_processor(kind), offline.make_model(kind)
    rows = dataset_rows()
    if kind == "llava_onevision":
        rows = [row for row in rows if len(row["images"]) < 2]
    true = []
    with Float64(), torch.no_grad():
        for row in rows:
            batch = dict(DataCollatorForVisionPreference(processor)([copy.deepcopy(row)]))
            scored = batch.pop("completion_mask")[:, 1:]
            logps = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
            true += (logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * scored).sum(1).tolist()
        own = answer_logprobs(flexpatch.apply(model), Collator(processor)(rows)).answers
    assert (own - torch.tensor(true, dtype=own.dtype)).abs().max() < BOUND


def test_labels_of_a_processor_are_no_images() -> None:
    """PaliGemma's makes them beside ids."""
    processor, model = offline.make_processor("paligemma"), flexpatch.apply(tiny_model("paligemma"))
    assert answer_logprobs(model, Collator(processor)(dataset_rows()[:2])).answers.isfinite().all()


def test_images_that_depend_on_others() -> None:
    processor, model = offline.make_processor("llava_onevision"), flexpatch.apply(tiny_model("llava_onevision"))
    rows = Collator(processor)([dataset_rows()[2]])
    with pytest.raises(FlexpatchError, match="sample 0: the prompt: rows cannot run with several images in a prompt"):
        answer_logprobs(model, rows)


def test_dataset_rows_through_a_model() -> None:
    processor, rows = offline.make_processor("qwen2_5_vl"), dataset_rows()
    batch = dict(DataCollatorForVisionPreference(processor)(copy.deepcopy(rows)))
    scored = batch.pop("completion_mask")[:, 1:]
    model = tiny_model("qwen2_5_vl")
    with torch.no_grad(), Float64():
        logps = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        true = (logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * scored).sum(-1)
        ours = answer_logprobs(flexpatch.apply(model), Collator(processor)(rows)).answers
    assert (ours.view(-1, 2).T.flatten() - true).abs().max() < BOUND


def test_plain_text_and_single_images() -> None:
    processor = offline.make_processor("gemma3")
    row = dict(image=offline.picture(0), prompt="See <start_of_image>", chosen="a cat", rejected="a dog")
    tree = Collator(processor).tree(row)
    assert tree.ids[:4] == processor.tokenizer("See ", add_special_tokens=False)["input_ids"]
    assert tree.ids.count(149) == 4 and tree.images is not None and tree.images["pixel_values"].shape == (1, 3, 28, 28)
    without = {name: value for name, value in row.items() if name != "image"} | dict(prompt="See ")
    assert Collator(processor).tree(without) == Collator(processor.tokenizer).tree(without)


WRONG_ROWS: dict[str, dict[str, Any]] = {
    "sample 0: the processor failed: ValueError: the row has 2 images, and its messages have places for 1": dict(
        images=[offline.picture(0)] * 2, prompt=dataset_rows()[3]["prompt"]
    ),
    "sample 0: the processor failed: .* an answer has 0 images, and its messages have places for 1": dict(
        chosen=[dict(role="assistant", content=[dict(type="image")])]
    ),
    "sample 0: the processor failed: ": dict(prompt="No mark of the image", chosen="a", rejected="b"),
    "sample 0: columns 'images' and 'image' are synonyms": dict(image=offline.picture(0)),
    "sample 0: column 'images' holds str; expected a list of images": dict(images="cat.png"),
    "sample 0: the prompt alone has .* tokens, max_length is 20": dict(prompt=messages("What " * 9)),
    "sample 0: the images of a tokenised row go into flexpatch.Tree": dict(
        prompt_ids=[7], chosen_ids=[8], rejected_ids=[9]
    ),
}


@parameterized.expand(list(WRONG_ROWS.items()))
def test_wrong_rows(message: str, changes: dict[str, Any]) -> None:
    collate = Collator(offline.make_processor("qwen2_5_vl"), max_length=20)
    with pytest.raises(FlexpatchError, match=message):
        collate([dataset_rows()[0] | changes])


def test_a_processor_where_one_is_wanted() -> None:
    processor = offline.make_processor("qwen2_5_vl")
    with pytest.raises(FlexpatchError, match=re.escape("sample 0: its images need Collator(processor)")):
        Collator(processor.tokenizer)(dataset_rows())
    with pytest.raises(FlexpatchError, match="makes no tokens: pass the whole processor"):
        Collator(processor.image_processor)


# --- the verifier -------------------------------------------------------------------------------------------------


def check_report(kind: str) -> None:
    report = check_parity(tiny_model(kind))
    names = {check.name for check in report.checks}
    record = multimodal_types()[kind]
    assert report.passed, str(report)
    for name in ("log-probs, one row", "log-probs, folded batches", "gradients of the DPO loss, tower"):
        assert f"{name}, images" in names and f"{name.replace(', tower', '')}" in names
    control = "control, log-probs, images: "
    assert f"{control}taken as equal" in names
    assert (f"{control}positions of one axis" in names) == record.three_axes
    assert (f"{control}blocks dropped" in names) == (record.blocks is not None)


def test_the_verifier() -> None:
    check_report("gemma3")


@parameterized.expand([("qwen3_vl",), ("llava",), ("smolvlm",), ("mistral3",), ("paligemma",)])
@pytest.mark.slow
def test_the_verifier_of_each_layout(kind: str) -> None:
    check_report(kind)


@parameterized.expand([(kind, variant) for kind in KINDS for variant in range(len(variants(kind)))])
@pytest.mark.slow
def test_the_verifier_of_all(kind: str, variant: int) -> None:
    assert check_parity(tiny_model(kind, variant)).passed


def test_the_verifier_finds_images_taken_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(held: Any, units: list[Any], prints: Any) -> np.ndarray:
        return np.array([[unit.tokens for unit in units].index(unit.tokens) for unit in units])

    assert same_images.identities is flexpatch.media.identities
    monkeypatch.setattr("flexpatch.media.identities", equal)
    failed = [check.name for check in check_parity(tiny_model("llava")).checks if not check.passed]
    assert failed == [
        "log-probs, folded batches, images",
        "gradients, folded batches, images",
        "gradients, folded batches, tower, images",
    ]


def test_ids_that_mark_nothing() -> None:
    config = tiny_model("qwen3_vl").config
    ids = plain_ids(config, 151)
    usable = 151 - 3
    marks = torch.tensor([0, 1, 2, 146, 147, 148, 149])
    assert not torch.isin(ids, marks).any() and not torch.isin((ids - 3 + usable // 2) % usable + 3, marks).any()
