"""Importing this module imports, and so registers, every file of the folder ``adapters/``, and then every module that
an installed package names in the entry-point group ``flexpatch.adapters``.

The folder sits beside this package in a checkout and inside it in a wheel. It has no ``__init__.py`` on purpose: a
module that sets ``__path__`` is a package to the import system, and a folder without ``__init__.py`` never shadows
another distribution's ``adapters`` package.
"""

import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points
from pathlib import Path

from flexpatch.errors import FlexpatchWarning

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "adapters", _here.parent / "adapters") if p.is_dir()))]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

for _entry in entry_points(group="flexpatch.adapters"):
    try:
        _entry.load()
    except Exception as error:  # another package's mistake must not take all architectures with it
        warnings.warn(
            f"flexpatch: the adapter '{_entry.name}' of the package {_entry.dist.name if _entry.dist else '?'} "
            f"({_entry.value}) could not be loaded: {type(error).__name__}: {error}",
            FlexpatchWarning,
            stacklevel=2,
        )
