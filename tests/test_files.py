"""Data files of every form give the rows of the same JSON Lines file, or are refused by name."""

import csv
import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from helpers.fuzzing import fuzz, refused, temporary
from helpers.tokenizers_offline import make_tokenizer
from hypothesis import strategies as st
from pyarrow import feather, parquet

import flexpatch
from flexpatch import FlexpatchError, estimate, files, read_jsonl
from flexpatch.files import read_rows

IDS = [{"prompt_ids": [5, 6, n], "answer_ids": [[7, n], [8]]} for n in range(3)]
TEXTS = [
    {"prompt": "The cat sat", "chosen": ' on\r\nthe "mat", é', "rejected": "\non the log\n"},
    {"prompt": "007", "chosen": "NA", "rejected": "None"},
]
TALKS = [
    {
        "prompt": [{"role": "user", "content": f"Cat {n}?"}],
        "chosen": [{"role": "assistant", "content": "Dog."}],
        "rejected": [{"role": "assistant", "content": "Log."}],
    }
    for n in range(2)
]
ROWS = {"ids": IDS, "texts": TEXTS, "talks": TALKS}


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(map(json.dumps, rows))


def as_csv(rows: list[dict[str, Any]], path: Path, delimiter: str = ",", mark: str = "") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        cells = [[row[name] for name in rows[0]] for row in rows]
        writer.writerows([x if isinstance(x, str) else json.dumps(x) for x in row] for row in cells)


def as_stream(table: Any, path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Any] = {
    "rows.jsonl": lambda rows, path: path.write_text(lines(rows)),
    "marked.jsonl": lambda rows, path: path.write_text(lines(rows), encoding="utf-8-sig"),
    "wide.jsonl": lambda rows, path: path.write_text(lines(rows), encoding="utf-16"),
    "wider.jsonl": lambda rows, path: path.write_text(lines(rows), encoding="utf-32"),
    "marked.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(lines(rows).encode("utf-8-sig"))),
    "array.json": lambda rows, path: path.write_text(json.dumps(rows)),
    "pretty.json": lambda rows, path: path.write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8-sig"),
    "array.json.gz": lambda rows, path: path.write_bytes(gzip.compress(json.dumps(rows).encode("utf-16"))),
    "table.csv": as_csv,
    "excel.csv": lambda rows, path: as_csv(rows, path, mark="\ufeff"),
    "table.TSV": lambda rows, path: as_csv(rows, path, "\t"),
    "table.parquet": lambda rows, path: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "no_suffix": lambda rows, path: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "table.feather": lambda rows, path: feather.write_feather(pyarrow.Table.from_pylist(rows), path, "uncompressed"),
    "stream.arrow": lambda rows, path: as_stream(pyarrow.Table.from_pylist(rows), path),
    "folder": lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(name: str, kind: str, tmp_path: Path) -> None:
    rows = ROWS[kind]
    WRITERS[name](rows, tmp_path / name)
    read = read_rows(tmp_path / name)
    if Path(name).suffix.lower() in (".csv", ".tsv") and kind == "talks":
        rows = [{column: json.dumps(value) for column, value in row.items()} for row in rows]  # cells are text
    assert read == rows
    if ".json" in name:
        assert read_jsonl(str(tmp_path / name)) == rows


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "array.json", "folder"])
def test_estimates_are_those_of_the_same_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    results = []
    for file in ("rows.jsonl", name):
        WRITERS[file](TEXTS, tmp_path / file)
        options = ["--tokenizer", str(tmp_path / "tokenizer"), "--no-plot", "--json"]
        assert estimate.main([str(tmp_path / file), *options]) == 0
        results.append(json.loads(capsys.readouterr().out) | {"data": None})
    assert results[0] == results[1] and results[0]["rows"] == len(TEXTS)


def test_columns_of_datasets_own_types_are_decoded(tmp_path: Path) -> None:
    """Parquet holds such messages as text, and a tokenizer would take them for a prompt of raw text."""
    columns = datasets.Features({name: datasets.Json() for name in TALKS[0]} | {"picture": datasets.Image()})
    path = tmp_path / "talks.parquet"
    table = datasets.Dataset.from_list([row | {"picture": None} for row in TALKS], features=columns).data.table
    broken = pyarrow.array([{"bytes": b"no picture", "path": None}] * len(TALKS), table.schema.field("picture").type)
    parquet.write_table(
        table.set_column(table.column_names.index("picture"), table.schema.field("picture"), broken), path
    )
    assert isinstance(parquet.read_table(path).to_pylist()[0]["prompt"], str)
    assert read_rows(path) == [{"picture": None} | row for row in TALKS]
    with pytest.raises(Exception, match="cannot identify image"):  # pictures are named, and left alone
        list(datasets.Dataset(datasets.table.InMemoryTable(parquet.read_table(path))))
    with pytest.raises(FlexpatchError, match=r"^sample 0: no column 'chosen_ids'; it has .*'picture'"):
        flexpatch.Collator().layout(read_rows(path)[0] | {"prompt_ids": [1]})


def test_long_cells_and_the_limit_of_others(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [TEXTS[0] | {"prompt": "a" * (limit + 1)}]
    as_csv(rows, tmp_path / "long.csv")
    with (
        pytest.raises(csv.Error, match="field larger than field limit"),
        open(tmp_path / "long.csv", newline="") as file,
    ):
        list(csv.reader(file))
    assert read_rows(tmp_path / "long.csv") == rows
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("array.json", b'[{"a": 1}, [2]]', ", row 1: expected a JSON object, got list"),
        ("array.json", b'[{"a": 1},\n {"a": }]', ", line 2: Expecting value .expected one JSON object a line, or one"),
        ("array.json", b'[\n{"a": "\xe4"}]', ", line 2: 'utf-8' codec"),
        ("array.json", b"[" * 10**5, ", line 1: nested too deeply"),
        ("array.json", b"[]", " holds no rows"),
        ("array.json", b'[{"a": 1}]\n[{"a": 1}]', ", line 2: Extra data"),
        ("pretty.json", b'{\n"a": 1}', ", line 1: Expecting property name .*expected one JSON object a line"),
        ("cut.json", b"\xff\xfe{", ", line 1: 'utf-16.*' codec"),
        ("book.xlsx", b"PK\x03\x04....", ", line 1: a zip archive or a spreadsheet: unpack it, or export it as CSV"),
        ("few.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", ", line 3: 2 cells, but 3 columns"),
        ("many.csv", b"prompt,chosen\na,b\n\na,b,c\n", ", line 4: 3 cells, but 2 columns"),
        ("twice.csv", b"prompt,prompt\na,b\n", ", line 1: two columns have the same name: prompt, prompt"),
        (
            "ids.csv",
            b"prompt_ids,answer_ids\n[1],[[2]]\n[1],[2 3]\n",
            r", line 3: column 'answer_ids' holds '\[2 3\]'; exp",
        ),
        ("quotes.csv", b'prompt,chosen\n"a,b\n', r", line 2: unexpected end of data"),
        ("latin.csv", "prompt\nb\n\xe4\n".encode("latin-1"), r", line 3: 'utf-8' codec .*expected UTF-8"),
        ("empty.csv", b"", " holds no rows"),
        ("header.csv", b"prompt,chosen\n", " holds no rows"),
        ("not.csv.gz", b"prompt", ": Not a gzipped file"),
        ("cut.parquet", b"PAR1....", " cannot be read as Parquet: "),
        ("cut.arrow", b"ARROW1..", " cannot be read as Arrow: "),
        ("stream.arrow", b"\xff\xff\xff\xff\x10", " cannot be read as Arrow: "),
    ],
)
def test_damaged_files_are_named(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexpatchError, match=f"{name}{message}"):
        read_rows(tmp_path / name)
    assert estimate.main([str(tmp_path / name), "--no-plot"]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1


def test_read_jsonl_sends_tables_elsewhere(tmp_path: Path) -> None:
    for name in ("table.parquet", "stream.arrow", "table.feather"):
        WRITERS[name](TEXTS, tmp_path / name)
        with pytest.raises(FlexpatchError, match=rf"{name}, line 1: a table: read it with flexpatch\.files\.read_rows"):
            read_jsonl(tmp_path / name)


def test_folders_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(FlexpatchError, match="is a folder, but save_to_disk did not write it"):
        read_rows(tmp_path)
    split = datasets.Dataset.from_list(TEXTS)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "both")
    with pytest.raises(FlexpatchError, match=r"holds the splits test, train; give one of them: .*both.test"):
        read_rows(tmp_path / "both")
    assert read_rows(tmp_path / "both" / "train") == TEXTS
    (tmp_path / "both" / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(FlexpatchError, match="train cannot be read as a dataset's folder: "):
        read_rows(tmp_path / "both" / "train")


@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow", "folder"])
def test_without_datasets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    WRITERS[name](TEXTS, path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            FlexpatchError, match=r"reads: pip install datasets\. Or convert it where that is installed"
        ):
            read_rows(path)
        WRITERS["table.csv"](TEXTS, tmp_path / "table.csv")
        assert read_rows(tmp_path / "table.csv") == TEXTS  # needs nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow", "folder"])
def test_the_command_that_converts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where datasets is missing, the message gives one."""
    path = tmp_path / name
    WRITERS[name](TEXTS, path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "datasets", None)
        with pytest.raises(FlexpatchError, match=r"reads: pip install datasets\. Or convert it where") as no:
            read_rows(path)
    python, *command = shlex.split(str(no.value).split("installed: ")[1])
    assert python == "python"
    env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True, env=env, timeout=300)
    assert read_rows(tmp_path / "data.jsonl") == TEXTS


cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)


@fuzz(
    200,
    both=False,
    rows=st.lists(st.fixed_dictionaries({"prompt": cells, "chosen": cells, " ": cells}), min_size=1, max_size=4),
    tab=st.booleans(),
)
def test_tables_of_any_text(rows: list[dict[str, str]], tab: bool) -> bool:
    path = temporary("rows.tsv" if tab else "rows.csv", b"")
    as_csv(rows, path, "\t" if tab else ",")
    assert read_rows(path) == rows
    return True


@fuzz(
    300,
    suffix=st.sampled_from(["csv", "tsv", "json", "parquet", "arrow", "csv.gz", ""]),
    start=st.sampled_from(
        [b"", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\xff\xfe", b"[", b"a,prompt_ids\n", b'{"a":1}\n']
    ),
    rest=st.binary(max_size=40) | st.text('[]{}":,1a\n', max_size=40).map(str.encode),
)
def test_files_of_anything(suffix: str, start: bytes, rest: bytes) -> bool:
    path = temporary(f"file.{suffix}", start + rest)
    if refused(lambda: read_rows(path), "file."):
        return False
    rows = read_rows(path)
    assert rows and all(isinstance(row, dict) for row in rows)
    return True


@fuzz(100, name=st.sampled_from(["table.parquet", "stream.arrow", "table.feather"]), cut=st.integers(0, 3000))
def test_cut_tables(name: str, cut: int) -> bool:
    path = temporary(name, b"")
    WRITERS[name](TEXTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    if refused(lambda: read_rows(path), name):
        assert cut
        return False
    assert read_rows(path) == TEXTS
    return True


@pytest.mark.parametrize(
    ("prop", "name", "change"),
    [
        (test_tables_of_any_text, "_cell", lambda cell: cell.strip()),
        (test_files_of_anything, "_checked", lambda rows: [*rows, None]),
        (test_cut_tables, "_rows", lambda rows: rows[:-1]),
    ],
)
def test_the_properties_can_fail(prop: Any, name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = getattr(files, name)
    monkeypatch.setattr(files, name, lambda *args: change(honest(*args)))
    assert not prop.holds()
