"""Prints what the installed flexpatch requires, extras for tests included: NAME==VERSION, a line each.

python .ci/floors.py                                 # the lowest version that is allowed
python .ci/floors.py --installed                     # the one that is installed
python .ci/floors.py --table lowest.log newest.log   # benchmarks/results/environments.md, of what both printed
"""

import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

# Itself, in extras; what runs no code; and what needs a Hopper GPU.
SKIPPED = {"flexpatch", "mkdocs-material", "mypy", "ruff", "flash-attn-4", "nvidia-cutlass-dsl"}


def floors() -> dict[str, Version]:
    """Name -> lowest version. A package in two extras: what users may have is older than what the tests like best."""
    lowest: dict[str, Version] = {}
    for requirement in map(Requirement, requires("flexpatch") or []):
        if requirement.name not in SKIPPED:
            (floor,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
            lowest[requirement.name] = min(floor, lowest.get(requirement.name, floor))
    return lowest


def table(logs: list[str]) -> str:
    """What was installed in each environment, and what its tests said."""
    texts = [Path(log).read_text(encoding="utf-8") for log in logs]
    columns = [dict(re.findall(r"^([A-Za-z][\w-]*)==(\S+)$", text, re.MULTILINE)) for text in texts]
    pythons = [re.findall(r"^Python (\S+)$", text, re.MULTILINE)[-1] for text in texts]
    results = [re.findall(r"((?:\d+ failed, )?\d+ passed.*) in [\d.]+s", text)[-1] for text in texts]
    lines = ["| | `.ci/lowest` | `.ci/newest` |", "|---|---|---|", "| Python | " + " | ".join(pythons) + " |"]
    lines += [f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0]]
    said = [", ".join(part for part in result.split(", ") if "warning" not in part) for result in results]
    return "\n".join([*lines, "| tests | " + " | ".join(said) + " |"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--table"]:
        print(table(sys.argv[2:]))
    else:
        for name, floor in floors().items():
            print(f"{name}=={version(name) if '--installed' in sys.argv else floor}")
