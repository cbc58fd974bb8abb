"""Fill README's generated parts: ``python benchmarks/readme.py [MARKER FILE ...]``.

Without arguments the support table is made anew from the registry. ``parity table runs/parity.md`` (quoted as needed)
replaces what stands between ``<!-- parity table -->`` and ``<!-- end parity table -->`` with that file.
"""

import re
import sys
from pathlib import Path

import flexpatch

README = Path(__file__).resolve().parent.parent / "README.md"


def fill(marker: str, text: str) -> None:
    """Replace the part of README between a marker and its end."""
    part = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end {marker} -->)", re.DOTALL)
    readme, count = part.subn(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", README.read_text())
    if count != 1:
        sys.exit(f"README has {count} parts marked '{marker}'")
    README.write_text(readme)


if __name__ == "__main__":
    fill("support table", flexpatch.support_table())
    for marker, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        fill(marker, Path(file).read_text())
