"""Puts the folder ``adapters/`` into wheels as ``flexpatch/adapters``. All other settings are in pyproject.toml.

A mapping of folders in pyproject.toml would do so too, but it would break ``pip install -e``. With a mapping,
setuptools installs an import finder, which Python asks after its own finder. If the folder above a checkout called
``flexpatch`` is on ``sys.path``, Python's own finder takes the checkout for an empty package. Without a mapping,
setuptools writes a path file, and the real package wins.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copy the adapters too. In an editable install ``flexpatch/adapters.py`` finds them in the checkout."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*self.packages, "flexpatch.adapters"]
            self.package_dir = {**self.package_dir, "flexpatch.adapters": "adapters"}


setup(cmdclass={"build_py": BuildPy})
