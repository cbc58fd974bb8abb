"""Puts the folder ``adapters/`` into wheels as ``flexpatch/adapters``; pyproject.toml holds everything else.

A mapping in pyproject.toml would do the same, but would also change what ``pip install -e`` writes: a finder that
Python asks after its own. Python's own takes a checkout called ``flexpatch`` for an empty package wherever the folder
above it is on ``sys.path``. Without a mapping, setuptools writes a path file, and the real package wins over the empty.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the adapters too, unless the checkout itself is installed: there ``flexpatch/adapters.py`` finds them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*self.packages, "flexpatch.adapters"]
            self.package_dir = {**self.package_dir, "flexpatch.adapters": "adapters"}


setup(cmdclass={"build_py": BuildPy})
