"""python -m flexpatch.estimate on files with images: by the processor's rule, against patched models and torch."""

import io
import json
import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import datasets
import pytest
import torch
import transformers
from helpers import processors_offline
from helpers.needs import needs
from parameterized import parameterized
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

import flexpatch
from flexpatch import costs, estimate
from flexpatch.costs import Sample
from flexpatch.files import read_rows
from flexpatch.image_costs import Gallery, tower_of
from flexpatch.image_files import ORIENTATION, pictures, tried
from flexpatch.layouts import multimodal_types
from flexpatch.models import tiny_config, tiny_model

CHAT = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt }}"
)
QUESTION = ["what", "is", "this", "thing", "in", "the", "picture", "and", "what", "is", "it", "good", "for"]
WORDS = ["<pad>", "</s>", "user", "assistant", *dict.fromkeys(QUESTION), "a", "red", "blue", "box", "or"]


def tokenizer() -> Any:
    """Words, with the placeholder where the tiny LLaVA has it."""
    words = [*WORDS, *(f"w{n}" for n in range(151 - len(WORDS)))]
    words[tiny_config("llava").image_token_id] = "<image>"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, **special)


def processor() -> Any:
    """A processor for the tiny LLaVA."""
    images = transformers.CLIPImageProcessor(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    return transformers.LlavaProcessor(images, tokenizer(), 14, "default", CHAT, num_additional_image_tokens=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA without weights, as a hub has it."""
    path = tmp_path_factory.mktemp("llava")
    for part in (tiny_config("llava"), tokenizer(), processor()):
        part.save_pretrained(path)
    return str(path)


def picture(colour: str, width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def content(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rows_of(images: list[Any]) -> list[dict[str, Any]]:
    """Pairs about one image each, in front of the question; in the fourth it comes after it."""
    rows = []
    for number, image in enumerate(images):
        question = QUESTION if number < 2 else QUESTION[number:]
        answers = (["a", "red", "box"], ["a", "blue", "box", "or", "it"])
        row: dict[str, Any] = dict(images=[image], prompt=[dict(role="user", content=" ".join(question))])
        if number == 3:
            row["prompt"][0]["content"] = [dict(type="text", text="what"), dict(type="image")]
        for name, words in zip(("chosen", "rejected"), answers, strict=True):
            row[name] = [dict(role="assistant", content=" ".join(words))]
        rows.append(row)
    return rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(content(picture(colour, 40, 60)))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of(["a.png", "a.png", "b.png", "a.png"])))
    return path


def test_sizes_come_from_the_beginning_of_a_file(tmp_path: Path) -> None:
    wide = content(picture("red", 70, 20))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = content(picture("red", 70, 20), "JPEG", exif=exif)
    cut = content(Image.effect_noise((300, 200), 90))[:500]  # pixels are missing: nothing decodes it
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(cut)).load()
    (tmp_path / "wide.png").write_bytes(wide)
    found = pictures(["wide.png", wide, dict(bytes=None, path=str(tmp_path / "wide.png")), turned, cut], tmp_path)
    assert [(each.height, each.width) for each in found] == [(20, 70)] * 3 + [(70, 20), (200, 300)]
    assert len({each.digest for each in found}) == 3


@needs("transformers", "5.17", "images fold from there on")
@pytest.mark.parametrize("kind", processors_offline.KINDS)
def test_rows_are_as_long_as_the_collators(kind: str, tmp_path: Path) -> None:
    """Qwen's whole processor needs torchvision: that of images and the record count there."""
    processor = processors_offline.make_processor(kind)
    tiny_config(kind).save_pretrained(tmp_path)
    if kind == "qwen2_5_vl":
        processor.tokenizer.chat_template = processor.chat_template
        processor.image_processor.save_pretrained(tmp_path)
        processor.tokenizer.save_pretrained(tmp_path)
    else:
        processor.save_pretrained(tmp_path)
    gallery = Gallery(str(tmp_path), str(tmp_path), processor.tokenizer, max_length=None)
    assert kind != "qwen2_5_vl" or gallery.whole is None or find_spec("torchvision")
    found = set()
    for width, height in ((28, 28), (50, 20), (20, 61)):
        images = [processors_offline.picture(1, width, height), processors_offline.picture(2, 40, 40)]
        messages = [dict(role="user", content=[dict(type="image"), dict(type="text", text="and"), dict(type="image")])]
        row: dict[str, Any] = dict(prompt=messages, images=images)
        row |= {name: [dict(role="assistant", content=f"{name} one")] for name in ("chosen", "rejected")}
        true = flexpatch.Collator(processor).tree(row)
        layout, shown = gallery.layout(row, pictures([content(image) for image in images], tmp_path), 0)
        assert layout.answer_lengths == [len(child.ids) for child in true.children]
        assert len(layout) == len(true.ids) + sum(layout.answer_lengths)
        found.add(shown[0].tokens)
    assert (len(found) > 1) == (kind in ("qwen2_5_vl", "llava_next"))


@needs("transformers", "5.17", "images fold from there on")
def test_counts_are_those_of_a_patched_model(folder: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On TRL's own batches."""
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)
    name = folder
    options = estimate._parser().parse_args([str(data), "--tokenizer", name, "--model", name])
    samples, _ = estimate.read_samples(options)
    rows = [row | dict(images=[Image.open(data.parent / row["images"][0])]) for row in read_rows(data)]
    batch = dict(DataCollatorForVisionPreference(processor=transformers.AutoProcessor.from_pretrained(name))(rows))
    del batch["completion_mask"]
    model = flexpatch.apply(tiny_model("llava", dtype=torch.float32))
    model(**batch, use_cache=False)
    savings = flexpatch.savings(model)
    stock, row = costs.padded(samples), costs.folded(samples)
    assert (stock.tokens, stock.images) == (savings.padded, savings.images)
    assert (row.tokens, row.images) == (savings.computed, savings.images_run)
    assert (stock.images, row.images) == (8, 3)  # the first picture stands in two places, and the second in one
    assert Sample.saved(samples[0]) == 1 - samples[0].shared.tokens / samples[0].unshared.tokens


@parameterized.expand([("llava",), ("qwen2_vl",), ("qwen2_5_vl",), ("gemma3",), ("mistral3",)])
def test_flops_of_a_tower(kind: str) -> None:
    """Against torch's own count.

    Left out are CLIP's first token, that the last window is short, and that SigLIP's head has few tokens: little of
    the work, but for towers as tiny as these.
    """
    record, config = multimodal_types()[kind], tiny_config(kind)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    drawn = record.draw(model.config, 0, torch.Generator())
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in drawn.tensors.items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.get_image_features(**tensors)
    tower = tower_of(model.config)
    assert tower is not None
    tokens = drawn.tokens.count(getattr(model.config, record.images.token))
    counted = tower.flops(*tower.patches(tensors["pixel_values"]), tokens)
    assert counted == pytest.approx(
        counter.get_total_flops(), rel=dict(llava=0.1, qwen2_5_vl=0.02, gemma3=0.1).get(kind, 1e-9)
    )


def test_a_tower_of_convolutions_is_not_counted() -> None:
    with pytest.raises(flexpatch.FlexpatchError, match="the work of the vision tower of 'gemma3n' cannot be counted"):
        tower_of(transformers.AutoConfig.for_model("gemma3n"))


def test_the_report(folder: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder
    arguments = [str(data), "--tokenizer", name, "--model", name, "--no-plot", "--batch-size", "4"]
    assert estimate.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"]["count"], result["images"]["distinct"]) == (4, 2)
    assert result["lengths"]["image"]["mean"] == 4
    layouts = result["layouts"]
    assert {name: each["images"] for name, each in layouts.items()} == dict(
        padded=8, folded=3, packed_unshared=8, packed_shared=4
    )
    for name, share in result["images"]["tower_share"].items():
        assert share == layouts[name]["tower"] / layouts[name]["flops"] and 0 < share < 1
    assert layouts["padded"]["tower"] == 2 * layouts["packed_shared"]["tower"]
    assert estimate.main(arguments) == 0
    out = capsys.readouterr().out
    assert "the tower's share of FLOPs" in out and "an image" in out and "grey one of its size" in out


def test_a_preset_has_no_tower(folder: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main([str(data), "--tokenizer", folder, "--no-plot", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["images"]["tower_share"].values()) == {0.0} and result["layouts"]["padded"]["images"] == 8


def test_images_of_tables(folder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(data)[:3]  # a table cannot have both kinds of contents
    data.write_text("\n".join(map(json.dumps, rows)))
    kept = [row | dict(images=[Image.open(data.parent / row["images"][0])]) for row in rows]
    datasets.Dataset.from_list(kept).to_parquet(tmp_path / "data.parquet")
    name, found = folder, []
    for path in (data, tmp_path / "data.parquet"):
        assert estimate.main([str(path), "--tokenizer", name, "--model", name, "--no-plot", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["layouts"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(images=["none.png"]), "image 0: .*none.png"),
        (dict(images=["a.png", "data.jsonl"]), "image 1: cannot identify image file"),
        (dict(images=["https://example.org/a.png"]), "image 0: https://example.org/a.png is an address"),
        (dict(images=["a.png"], prompt="what is this", chosen="a", rejected="b"), "has places for 0 images, not 1"),
        (dict(images=["a.png"], prompt=[dict(role="user")]), "the processor failed"),
    ],
)
def test_bad_rows_are_named(
    change: dict[str, Any], words: str, folder: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(data)
    data.write_text("\n".join(json.dumps(row) for row in [rows[0], rows[1] | change, rows[2]]))
    arguments = [str(data), "--tokenizer", folder, "--no-plot"]
    assert estimate.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "sample 1: " in line and re.search(words, line)
    assert estimate.main([*arguments, "--skip-bad-rows"]) == 0
    assert "skipped 1 rows; the first: sample 1: " in capsys.readouterr().out


def test_images_need_a_processor(folder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer().save_pretrained(tmp_path / "text")
    for options in ([], ["--tokenizer", str(tmp_path / "text")]):
        tokenised = [dict(prompt_ids=[1, 149], chosen_ids=[2], rejected_ids=[3], images=["a.png"])]
        data.write_text(json.dumps(tokenised))
        assert estimate.main([str(data), *options, "--no-plot"]) == 2
        said = capsys.readouterr().err
        assert "a model with a processor" in said or "has no processor of images" in said


@parameterized.expand([(1,), (4,)])
def test_tokenised_rows(places: int) -> None:
    """With one place for an image, or as many as the processor makes."""
    name = mkdtemp()
    tiny_config("llava").save_pretrained(name)
    processor().save_pretrained(name)
    gallery = Gallery(name, None, transformers.AutoTokenizer.from_pretrained(name), max_length=None)
    (seen,) = pictures(content(picture("red", 30, 30)), Path(name))
    row = dict(prompt_ids=[7, *[149] * places, 8, *[149] * places, 9], chosen_ids=[5], rejected_ids=[6, 7])
    layout, shown = gallery.layout(row, [seen, seen], 0)
    assert layout.ids.tolist() == [7, *[shown[0].key] * 4, 8, *[shown[1].key] * 4, 9, 5, 6, 7]
    assert isinstance(tried("none.png", Path(name)), flexpatch.FlexpatchError)
