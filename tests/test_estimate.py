"""python -m flexpatch.estimate: its counts against the batches and rows themselves, and its command line."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tokenizers_offline import make_tokenizer
from parameterized import parameterized

import flexpatch
from flexpatch import costs, estimate
from flexpatch.costs import PRESETS, Cost, Model, Sample
from flexpatch.counts import Counts
from flexpatch.fold import fold_batch
from flexpatch.models import tiny_model
from flexpatch.tree import Layout

TEXTS = [
    {"prompt": "What is the capital of France?", "chosen": " It is Paris.", "rejected": " It is Rome, the cat."},
    {"prompt": "The cat sat", "answers": [" on the mat.", " on the mat and the log.", " down.", " on the mat."]},
    {"chosen": "\n\nHuman: Why? \n\nAssistant: So.", "rejected": "\n\nHuman: Why? \n\nAssistant: Who knows?"},
    {"prompt": [{"role": "user", "content": "Cat?"}], "answers": [[{"role": "assistant", "content": "Dog."}]]},
]


def random_rows(seed: int, count: int = 13) -> list[dict[str, Any]]:
    """Tokenised rows with 1 to 5 answers, of few distinct tokens so that prompts and answers often begin alike."""
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return rng.integers(3, 5, rng.integers(1, longest + 1)).tolist()

    return [
        {"prompt_ids": [3, *ids(40)], "answer_ids": [ids(30) for _ in range(rng.integers(1, 6))]} for _ in range(count)
    ]


def write(path: Path, rows: list[Any]) -> str:
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def layouts_of(rows: list[dict[str, Any]]) -> list[Layout]:
    collator = flexpatch.Collator(make_tokenizer())
    return [collator.layout(row, i) for i, row in enumerate(rows)]


def padded_arrays(layouts: list[Layout]) -> tuple[np.ndarray, np.ndarray]:
    """(N, S) ids and mask, as a stock trainer's collator makes them."""
    sequences = [layout.ids[path] for layout in layouts for path in layout.answers]
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros(ids.shape, bool)
    for n, sequence in enumerate(sequences):
        ids[n, : len(sequence)], mask[n, : len(sequence)] = sequence, True
    return ids, mask


def visible_pairs(rows: flexpatch.Rows) -> int:
    """By the rule itself, over all pairs of tokens of each row."""
    q = torch.arange(rows.ends.shape[1])
    seen = (q <= q[:, None]) & (q[:, None] < rows.ends[:, None, :])
    return int(seen.sum()) - (rows.input_ids.numel() - rows.tokens)  # padding sees itself


@parameterized.expand([(seed,) for seed in range(8)])
def test_a_padded_and_a_folded_batch(seed: int) -> None:
    layouts = layouts_of(random_rows(seed) + TEXTS * (seed % 2))
    samples = [Sample.of(layout) for layout in layouts]
    ids, mask = padded_arrays(layouts)
    folded = fold_batch(ids, mask)
    assert folded is not None
    stock, row = costs.padded(samples), costs.folded(samples)
    assert Counts(stock.tokens, int(mask.sum()), row.tokens) == folded.counts
    assert row.pairs == visible_pairs(folded.rows) - (folded.padding is not None)
    N, S = ids.shape
    assert stock.pairs == N * int(np.tril(np.ones((S, S))).sum())
    assert stock.logits == row.logits == ids.size


def test_a_batch_that_folding_hardly_shrinks_runs_as_given() -> None:
    rng = np.random.default_rng(0)
    rows = [{"prompt_ids": [n], "answer_ids": rng.integers(9, 99, (2, 30)).tolist()} for n in range(4)]
    samples = [Sample.of(layout) for layout in layouts_of(rows)]
    assert costs.folded(samples) == costs.padded(samples) == Cost(8 * 31, 8 * 31 * 16, 8 * 31)


@pytest.mark.usefixtures("flex_on_cpu")
def test_folding_counts_what_apply_counts() -> None:
    """On batches that a patched model folds, and on one it leaves as it was given."""
    torch._dynamo.reset()
    model = flexpatch.apply(tiny_model("llama", dtype=torch.float32), backend="flex")
    rng = np.random.default_rng(1)
    unlike = [{"prompt_ids": [n], "answer_ids": rng.integers(9, 99, (2, 30)).tolist()} for n in range(4)]
    batches = [layouts_of(rows) for rows in (random_rows(0), unlike, random_rows(1)[:2])]
    for layouts in batches:
        ids, mask = map(torch.from_numpy, padded_arrays(layouts))
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    savings = flexpatch.savings(model)
    samples = [[Sample.of(layout) for layout in layouts] for layouts in batches]
    assert savings.folded == 2
    assert savings.padded == sum(costs.padded(batch).tokens for batch in samples)
    assert savings.computed == sum(costs.folded(batch).tokens for batch in samples)


@parameterized.expand([(seed,) for seed in range(8)])
def test_packed_rows(seed: int) -> None:
    layouts = layouts_of(random_rows(seed) + TEXTS)
    samples = [Sample.of(layout) for layout in layouts]
    rows = flexpatch.build_rows([[layout] for layout in layouts])
    assert Cost.total(s.shared for s in samples).tokens == rows.tokens
    assert Cost.total(s.shared for s in samples).pairs == visible_pairs(rows)
    assert Cost.total(s.shared for s in samples).logits == len(rows.targets)
    alone = flexpatch.build_rows([[flexpatch.Tree(x.ids[path], answer=True)] for x in layouts for path in x.answers])
    assert Cost.total(s.unshared for s in samples).tokens == alone.tokens == rows.separate_tokens
    assert Cost.total(s.unshared for s in samples).pairs == visible_pairs(alone)
    assert Cost.total(s.unshared for s in samples).logits == len(rows.targets)
    assert [length for s in samples for length in s.answers] == [n for x in layouts for n in x.answer_lengths]


def test_epoch_budgets_and_flops() -> None:
    layouts = [layout for seed in range(30) for layout in layouts_of(random_rows(seed))]
    samples = [Sample.of(layout) for layout in layouts]
    result = estimate.estimate(samples, PRESETS["8b"], batch_size=8, seed=3)
    order = np.random.default_rng(3).permutation(len(layouts))
    batches = [[layouts[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
    counted = [fold_batch(*padded_arrays(batch)) for batch in batches]
    assert result["layouts"]["padded"]["tokens"] == sum(f.counts.padded for f in counted if f)
    assert result["layouts"]["folded"]["tokens"] == sum(f.counts.computed for f in counted if f)
    other = estimate.estimate(samples, PRESETS["8b"], batch_size=8, seed=4)
    assert other["layouts"]["padded"] != result["layouts"]["padded"]
    assert other["layouts"]["packed_shared"]["flops"] == result["layouts"]["packed_shared"]["flops"]
    speedups = {name: layout["speedup"] for name, layout in result["layouts"].items()}
    assert speedups["padded"] == 1 < speedups["folded"] < speedups["packed_shared"]
    lengths = [len(layout) for layout in layouts]
    for entry in result["budgets"]:
        bins = flexpatch.pack(lengths, entry["budget"])
        assert entry["rows"] == len(bins)
        assert entry["empty"] == pytest.approx(1 - sum(lengths) / (len(bins) * entry["budget"]))


def test_the_best_budget_is_the_smallest_that_is_nearly_full() -> None:
    """50 trees of 1,300 tokens: 1, 3, 6 and 12 of them leave 5% and more of a row, 25 leave less than 1%."""
    (layout,) = layouts_of([{"prompt_ids": [1] * 1298, "answer_ids": [[2], [3]]}])
    result = estimate.estimate([Sample.of(layout)] * 50, PRESETS["1b"], batch_size=8, seed=0)
    assert [entry["empty"] < 0.02 for entry in result["budgets"]] == [False] * 4 + [True] * 2
    assert [entry["rows"] for entry in result["budgets"]] == [50, 17, 9, 5, 2, 1]
    assert result["best_budget"] == 32768


def test_budgets_hold_the_longest_tree() -> None:
    for length, budgets in ((3000, [4096, 8192, 16384, 32768, 65536]), (65537, [131072])):
        (layout,) = layouts_of([{"prompt_ids": [1] * (length - 2), "answer_ids": [[2], [3]]}])
        result = estimate.estimate([Sample.of(layout)], PRESETS["1b"], batch_size=8, seed=0)
        assert [entry["budget"] for entry in result["budgets"]] == budgets
        assert result["best_budget"] == budgets[0]  # none is nearly full: the fullest


def test_flops_of_a_model() -> None:
    """Against the parameters of a real (tiny, gated) model."""
    model = tiny_model("llama")
    config = model.config
    sizes = Model(
        config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size,
    )  # fmt: skip
    matrices = [p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    assert sizes.flops(Cost(7, 0, 0)) == 2 * 7 * sum(matrices)
    assert sizes.flops(Cost(0, 0, 5)) == 2 * 5 * model.lm_head.weight.numel()
    # Scores and weighted values: two products over every head's width.
    assert sizes.flops(Cost(0, 11, 0)) == 11 * config.num_hidden_layers * 2 * 2 * config.num_attention_heads * 16
    assert 6.9e9 < PRESETS["8b"].flops(Cost(1, 0, 0)) / 2 < 7.1e9  # 8.03e9 less embedding and head


def test_sizes_of_a_saved_model(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").config.save_pretrained(tmp_path)
    config = tiny_model("qwen3_moe").config
    sizes = costs.model_of(str(tmp_path))
    assert sizes.ffn == config.num_experts_per_tok * config.moe_intermediate_size
    assert sizes[:2] == (64, 4) and sizes[3:] == (4, 2, 16, 151)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_json_and_the_plot(name: str, tmp_path: Path, tokenizer_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, png = write(tmp_path / name, TEXTS), tmp_path / "out.png"
    assert estimate.main([data, "--tokenizer", tokenizer_dir, "--json", "--plot", str(png), "--batch-size", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "rows", "answers", "batch_size", "seed", "layouts", "lengths", "saved", "budgets", "best_budget", "rule",
        "assumptions", "data", "skipped", "model", "plot",
    }  # fmt: skip
    assert (result["rows"], result["answers"], result["skipped"], result["plot"]) == (4, 9, [], str(png))
    assert list(result["layouts"]) == ["padded", "folded", "packed_unshared", "packed_shared"]
    for layout in result["layouts"].values():
        assert set(layout) == {"tokens", "pairs", "logits", "flops", "speedup"}
    for lengths in (*result["lengths"].values(), result["saved"]):
        assert list(lengths) == ["mean", "min", "p10", "p50", "p90", "p99", "max"]
    assert set(result["budgets"][0]) == {"budget", "rows", "empty", "unshared_rows"}
    assert result["model"] == {"name": "8b", **PRESETS["8b"]._asdict()}
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_one_tokenised_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its counts by hand: prompt 3, answers 2 and 3, which share their first token."""
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [8, 4, 4]}
    assert estimate.main([write(tmp_path / "one.jsonl", [row]), "--plot", str(tmp_path / "one.png")]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line[30:].split() for line in out.splitlines() if "  " in line}
    assert out.startswith("1 rows, 2 answers; FLOPs of 8b\n")
    assert lines["a prompt with all its answers"] == ["7", "7", "7", "7", "7", "7", "7"]
    tokens = {"padded batches of 8 rows": "12", "packed, unshared": "11", "packed, shared": "7"}
    assert {name: lines[name][0] for name in tokens} == tokens
    assert "an estimate by FLOPs, not a measurement" in out and "Overheads are not modelled" in out
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_max_length_and_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt_ids": [5] * 4, "chosen_ids": [8] * n, "rejected_ids": [9]} for n in (9, 3, 1)]
    data = write(tmp_path / "data.jsonl", rows)
    assert estimate.main([data, "--no-plot", "--json", "--max-length", "6", "--limit", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["plot"]) == (2, None)
    assert result["lengths"]["sequence"]["max"] == 6 and result["lengths"]["answer"]["max"] == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "data.jsonl"]


def test_bad_rows_are_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt_ids": [5, 6], "answer_ids": [[7], [8]]}
    bad = [{**good, "answer_ids": [[7], []]}, {**good, "prompt_ids": "no"}, {**good, "answer_ids": [[-1]]}]
    data = write(tmp_path / "data.jsonl", [good, *bad, good])
    assert estimate.main([data, "--no-plot"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sample 1: answer 1 is empty" in captured.err and len(captured.err.strip().splitlines()) == 1
    assert estimate.main([data, "--no-plot", "--skip-bad-rows"]) == 0
    captured = capsys.readouterr()
    assert "2 rows, 4 answers" in captured.out and "skipped 3 rows; the first: sample 1: answer 1" in captured.out
    data = write(tmp_path / "none.jsonl", bad)
    assert estimate.main([data, "--no-plot", "--skip-bad-rows"]) == 2
    assert "holds no usable row; the first: sample 0: answer 1 is empty" in capsys.readouterr().err


GOOD = '{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}'


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ([GOOD, "{"], [], "line 2"),
        ([], [], "holds no rows"),
        (["[1]"], [], "row 0: expected a JSON object"),
        ([GOOD, '{"prompt": "a", "chosen": "b", "rejected": "c"}'], ["--skip-bad-rows"], "sample 1: a row without"),
        ([GOOD], ["--tokenizer", "missing.gguf"], "there is no GGUF file missing.gguf"),
        ([GOOD], ["--model", "./no-such-model"], "cannot load ./no-such-model"),
        ([GOOD], ["--plot", "no/such/folder/x.png"], "no/such/folder/x.png"),
        ([GOOD], ["--max-length", "2"], "sample 0: the prompt alone has 2 tokens"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    lines: list[str], options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = options if "--plot" in options else ["--no-plot", *options]
    assert estimate.main([write(tmp_path / "data.jsonl", lines), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("flexpatch.estimate: error: ") and words in error[0]


@parameterized.expand([([],), (["x", "--batch-size", "0"],), (["x", "--limit", "many"],), (["x", "--seed", "-1"],)])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        estimate.main(arguments)
    assert stopped.value.code == 2


@parameterized.expand([("x",), (0,), (-3,), (None,), ([4],)])
def test_sizes_that_are_none(size: Any) -> None:
    with TemporaryDirectory() as folder:
        tiny_model("llama", dtype=torch.float32).config.save_pretrained(folder)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": size, "head_dim": None}))
        # Old releases of transformers load -3.
        refused = f"cannot load {folder}: |{folder} gives heads = -3; expected a positive integer"
        with pytest.raises(flexpatch.FlexpatchError, match=refused):
            costs.model_of(folder)


@parameterized.expand(
    [
        ({"num_attention_heads": "x"}, "has sizes that are not numbers: "),
        ({"num_attention_heads": 0}, "has sizes that are not numbers: "),
        ({"num_hidden_layers": None}, r"gives layers = None; expected a positive integer"),
        ({"num_hidden_layers": -3}, r"gives layers = -3; expected a positive integer"),
        ({"vocab_size": [4]}, r"gives vocabulary = \[4\]; expected a positive integer"),
        ({"hidden_size": 0.5, "head_dim": 2}, r"gives hidden = 0\.5; expected a positive integer"),
        ({"vocab_size": ...}, "has no 'vocab_size'; try 1b, 3b"),
    ]
)
def test_sizes_that_transformers_lets_pass(sizes: dict[str, Any], message: str) -> None:
    """What it checks differs from release to release, and code that comes with a model need not check at all."""
    known = tiny_model("llama", dtype=torch.float32).config.to_dict() | {"head_dim": None} | sizes
    given = SimpleNamespace(to_dict=lambda: {key: value for key, value in known.items() if value is not ...})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "load_config", lambda *args, **kwargs: SimpleNamespace(get_text_config=lambda: given))
        with pytest.raises(flexpatch.FlexpatchError, match=f"^the configuration of odd {message}"):
            costs.model_of("odd")


def test_help_states_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        estimate.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert estimate.RULE in out and estimate.ASSUMPTIONS in out


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    data = write(tmp_path / "data.jsonl", [GOOD])
    assert estimate.main([data]) == 2
    assert "pip install matplotlib, or pass --no-plot" in capsys.readouterr().err
    assert estimate.main([data, "--no-plot"]) == 0
