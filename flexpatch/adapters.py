"""Registers all adapters: files of the folder ``adapters/``, then modules of other packages.

An adapter registers itself when it is imported, and this module imports all of them. Other packages name their modules
in the entry-point group ``flexpatch.adapters``.

The folder is beside this package in a checkout, and inside it in a wheel. The folder has no ``__init__.py`` on purpose:
so it never shadows another distribution's package ``adapters``. Python takes this module for a package because it sets
``__path__``.
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
    except Exception as error:  # a mistake of another package must not disable all architectures
        warnings.warn(
            f"flexpatch: the adapter '{_entry.name}' of the package {_entry.dist.name if _entry.dist else '?'} "
            f"({_entry.value}) could not be loaded: {type(error).__name__}: {error}",
            FlexpatchWarning,
            stacklevel=2,
        )
