"""Files of dataset rows: JSON Lines, JSON arrays and CSV natively; Parquet and Arrow through the ``datasets`` library.

Text may be gzipped, and may begin with a byte-order mark of UTF-8, UTF-16 or UTF-32. No file is written, not even in
the cache of ``datasets``.
"""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexpatch.errors import FlexpatchError, first_line
from flexpatch.processing import COLUMNS

# UTF-32 comes first, because its little-endian mark begins with UTF-16's.
WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PARQUET, FEATHER, STREAM, ZIP = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"PK\x03\x04"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Columns whose cells are more than text. CSV holds them as JSON.
NESTED = (
    *("prompt_ids", "chosen_ids", "rejected_ids", "answer_ids", "completion_ids"),
    *("answers", "completions", "tools", "chat_template_kwargs"),
)
READ = ("prompt", "chosen", "rejected", *NESTED)
JSON_FORMS = "(expected one JSON object a line, or one array of them)"
CONVERT = {
    "Parquet": "Dataset.from_parquet({path!r})",
    "Arrow": "load_dataset('arrow', data_files={path!r}, split='train')",
    "a dataset's folder": "load_from_disk({path!r})",
}


def read_rows(path: str | os.PathLike[str], images: Callable[[Any], Any] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a data file.

    Args:
        path: JSON Lines, a JSON array, CSV (``.csv``, ``.tsv``), Parquet, Arrow, or a folder that ``save_to_disk`` of
            the ``datasets`` library wrote. In CSV the columns of ``NESTED`` hold JSON, all others text. In Parquet and
            Arrow the columns that :class:`flexpatch.Collator` reads are loaded; others keep their names, and ``None``
            for values.
        images: What to make of a value in a column ``images`` or ``image`` of Parquet and Arrow, which is not decoded;
            ``None``: these columns are not loaded.

    Returns:
        One dict a row, column name to value.

    Raises:
        FlexpatchError: If there are no rows, a line or row cannot be read (the message names it), or the file needs
            the ``datasets`` library, which is not installed.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _checked(path, _folder(path, images))
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith((PARQUET, FEATHER, STREAM)):
        return _checked(path, _table(path, start, images))
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")
    if suffix.lower() in DELIMITERS:
        return _checked(path, _csv(path, DELIMITERS[suffix.lower()]))
    return read_jsonl(path)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file or of a JSON array, plain or gzipped, with or without a byte-order mark.

    Args:
        path: The file.

    Returns:
        One dict a row, column name to value.

    Raises:
        FlexpatchError: If there are no rows, or a row is not a JSON object. The message names the line, or the row of
            the array.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    number = 1
    try:
        # Bytes are decoded line by line: a text file is decoded ahead, so its errors would name a later line.
        with _text(path) as lines:
            at = lines.tell()
            array = lines.read(512).lstrip().startswith(b"[")
            lines.seek(at)
            if array:
                return _checked(path, _array(path, lines.read()))
            for line in lines:
                if text := line.decode("utf-8").strip():
                    rows.append(json.loads(text))
                    if not isinstance(rows[-1], dict):
                        raise ValueError(f"expected a JSON object, got {type(rows[-1]).__name__}")
                number += 1
    except RecursionError as error:
        raise FlexpatchError(f"{path}, line {number}: nested too deeply") from error
    except FlexpatchError:
        raise
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FlexpatchError(f"{path}, line {number}: {error} {JSON_FORMS}") from error
    return _checked(path, rows)


def _checked(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        raise FlexpatchError(f"{path} holds no rows")
    return rows


@contextmanager
def _text(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as UTF-8, positioned after its byte-order mark.

    Raises:
        ValueError: For an archive, a table, or text that contradicts its byte-order mark.
    """
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        start = file.read(8)
        if start.startswith((PARQUET, FEATHER, STREAM)):
            raise ValueError("a table: read it with flexpatch.files.read_rows")
        if start.startswith(ZIP):
            raise ValueError("a zip archive or a spreadsheet: unpack it, or export it as CSV")
        wide = next((encoding for mark, encoding in WIDE.items() if start.startswith(mark)), None)
        file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        yield io.BytesIO(file.read().decode(wide).encode()) if wide else file


def _array(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Read the rows of a JSON array."""
    try:
        rows = json.loads(_decoded(path, content))
    except json.JSONDecodeError as error:
        raise FlexpatchError(f"{path}, line {error.lineno}: {error.msg} {JSON_FORMS}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise FlexpatchError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
    return rows


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FlexpatchError(f"{path}, line {line}: {error} (expected UTF-8)") from error


def _csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    """Read the rows of a table in text. Cells stay text, except in the columns of ``NESTED``."""
    try:
        with _text(path) as file:
            content = file.read()
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FlexpatchError(f"{path}: {error}") from error
    reader = csv.reader(io.StringIO(_decoded(path, content), newline=""), delimiter=delimiter, strict=True)
    rows = []
    most = csv.field_size_limit(len(content) + 1)  # a setting of the whole process
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise ValueError(f"two columns have the same name: {', '.join(header)[:200]}")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, but {len(header)} columns")
            rows.append({name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)})
    except (ValueError, RecursionError, csv.Error) as error:
        raise FlexpatchError(f"{path}, line {reader.line_num}: {first_line(error)}") from error
    finally:
        csv.field_size_limit(most)
    return rows


def _cell(name: str, cell: str) -> Any:
    if name not in NESTED:
        return cell
    try:
        return json.loads(cell) if cell else None
    except ValueError as error:
        raise ValueError(f"column '{name}' holds {cell!r:.40}; expected JSON: {error}") from error


def _table(path: Path, start: bytes, images: Callable[[Any], Any] | None) -> list[dict[str, Any]]:
    """Read the rows of a Parquet or Arrow file."""
    kind = "Parquet" if start.startswith(PARQUET) else "Arrow"
    datasets = _datasets(path, kind)
    with _reading(path, kind), open(path, "rb") as file:
        from pyarrow import ipc, parquet

        if kind == "Parquet":
            table = parquet.read_table(file)
        else:
            table = (ipc.open_file if start.startswith(FEATHER) else ipc.open_stream)(file).read_all()
        # pyarrow alone returns columns of datasets' own types (Json) as text.
        return _rows(datasets.Dataset(datasets.table.InMemoryTable(table)), images)


def _folder(path: Path, images: Callable[[Any], Any] | None) -> list[dict[str, Any]]:
    """Read the rows of a folder that ``save_to_disk`` wrote."""
    splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
    if splits:
        raise FlexpatchError(f"{path} holds the splits {', '.join(splits)[:200]}; give one of them: {path / splits[0]}")
    if not (path / "state.json").is_file():
        raise FlexpatchError(f"{path} is a folder, but save_to_disk did not write it; give one of its files")
    datasets = _datasets(path, "a dataset's folder")
    with _reading(path, "a dataset's folder"):
        return _rows(datasets.load_from_disk(str(path)), images)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of datasets and pyarrow into one line that names the file."""
    try:
        yield
    except Exception as error:
        raise FlexpatchError(f"{path} cannot be read as {kind}: {type(error).__name__}: {first_line(error)}") from error


def _rows(dataset: Any, images: Callable[[Any], Any] | None) -> list[dict[str, Any]]:
    """Convert a dataset to dicts. Columns that are not read keep their names for error messages."""
    names = dict.fromkeys(dataset.column_names)
    shown = [name for name in COLUMNS if images is not None and name in names]
    for name in shown:
        dataset = dataset.cast_column(name, _undecoded(dataset.features[name]))
    known = dataset.with_format(None).select_columns([name for name in names if name in (*READ, *shown)])
    if not known.column_names:
        return [dict(names) for _ in range(len(dataset))]
    return [names | row | {name: images(row[name]) for name in shown if images} for row in known]


def _undecoded(feature: Any) -> Any:
    """Return the type of a column of images, or of lists of them, whose values are bytes and paths."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list):
        return [_undecoded(feature[0])]
    inner = getattr(feature, "feature", None)
    return feature if inner is None else type(feature)(_undecoded(inner))


def _datasets(path: Path, kind: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        dataset = CONVERT[kind].format(path=str(path))
        raise FlexpatchError(
            f"{path} is {kind}, which the datasets library reads: pip install datasets. Or convert it where that is "
            f"installed: python -c \"from datasets import *; {dataset}.to_json('data.jsonl')\""
        ) from error
    return datasets
