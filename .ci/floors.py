"""Prints what the installed flexpatch requires, extras for tests included: NAME==VERSION, a line each.

The version is the lowest that is allowed; with ``--installed`` the one that is installed.
"""

import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

SKIPPED = {"flexpatch", "mypy", "ruff"}  # itself, in extras; and what runs no code

floors: dict[str, Version] = {}
for requirement in map(Requirement, requires("flexpatch") or []):
    if requirement.name not in SKIPPED:
        (floor,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        # A package in two extras: what users may have is older than what the tests like best.
        floors[requirement.name] = min(floor, floors.get(requirement.name, floor))
for name, floor in floors.items():
    print(f"{name}=={version(name) if '--installed' in sys.argv else floor}")
