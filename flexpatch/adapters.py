"""Importing this module imports, and so registers, every file of the folder ``adapters/``.

The folder sits beside this package in a checkout and inside it in a wheel. It has no ``__init__.py`` on purpose: a
module that sets ``__path__`` is a package to the import system, and a folder without ``__init__.py`` never shadows
another distribution's ``adapters`` package.
"""

import importlib
import pkgutil
from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "adapters", _here.parent / "adapters") if p.is_dir()))]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
