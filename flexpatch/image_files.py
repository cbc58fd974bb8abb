"""Sizes of the images of dataset rows, read from the beginnings of their files: no pixel is decoded."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexpatch.errors import FlexpatchError, first_line
from flexpatch.processing import COLUMNS

ORIENTATION = 0x0112  # EXIF's tag; from 5 on width and height change places


class Picture(NamedTuple):
    """An image of a dataset row.

    Attributes:
        height: Pixels, as it is shown.
        width: Pixels.
        digest: Tells images from others.
    """

    height: int
    width: int
    digest: bytes


def column_of(row: Mapping[str, Any]) -> str | None:
    """Return the column in which a row has images; ``None`` if it has none."""
    return next((name for name in COLUMNS if row.get(name) is not None and row[name] != []), None)


def pictures(value: Any, folder: Path) -> list[Picture]:
    """Look at the images of a row.

    Args:
        value: One image or a list of them: paths, bytes, or dicts with either, as the ``datasets`` library keeps them.
        folder: Where relative paths begin, unless they exist as they are.

    Returns:
        The images, in order.

    Raises:
        FlexpatchError: For an image that cannot be read. The message says which.
    """
    values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    found = []
    for number, each in enumerate(values):
        try:
            found.append(_picture(each, folder))
        except Exception as error:  # Pillow raises all kinds of errors for files that are none of its own
            raise FlexpatchError(f"image {number}: {first_line(error)}") from error
    return found


def tried(value: Any, folder: Path) -> list[Picture] | FlexpatchError:
    """Look at the images of a row without raising.

    Args:
        value, folder: As :func:`pictures` takes them.

    Returns:
        The images; or the error in place of images that cannot be read.
    """
    try:
        return pictures(value, folder)
    except FlexpatchError as error:
        return error


def _picture(value: Any, folder: Path) -> Picture:
    from PIL import Image  # comes with processors and with datasets; not needed otherwise

    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        if "://" in value:
            raise ValueError(f"{value[:80]} is an address; only files are read")
        path = Path(value)
        value = (path if path.is_absolute() or path.exists() else folder / path).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"expected a path or bytes, got {type(value).__name__}")
    with Image.open(io.BytesIO(value)) as image:
        width, height = image.size
        exif = Image.Exif()
        exif.load(image.info.get("exif") or b"")  # image.getexif() decodes a PNG
        if exif.get(ORIENTATION, 1) >= 5:
            width, height = height, width
    return Picture(height, width, hashlib.sha256(value).digest())
