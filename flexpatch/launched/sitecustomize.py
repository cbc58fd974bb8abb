"""Starts with every Python process of a program that ``python -m flexpatch.launch`` runs.

Python runs the first ``sitecustomize`` on its path. Here is the program's own folder of it, whose ``sitecustomize``,
if there is another behind it, runs as ever.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_here = Path(__file__).resolve().parent
_spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path).resolve() != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))

try:
    from flexpatch.autopatch import install
except ImportError:
    print(f"flexpatch: it is not installed for {sys.executable}, whose models run as they are", file=sys.stderr)
else:
    install()
