"""``import flexpatch`` finds the package wherever Python is started, also above a checkout that is called flexpatch."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.needs import needs_licenses

ROOT = Path(__file__).resolve().parent.parent
# What a build reads. The library itself stays out: without torch, each of many processes takes an instant.
BUILD = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "flexpatch/adapters.py", "flexpatch/errors.py"]
BUILD += [f"flexpatch/{name}" for name in ("integrations/__init__.py", "integrations/swift/__init__.py")]
BUILD += ["flexpatch/launched/sitecustomize.py"]
STUB = '__version__ = "0.1.0"\ndef apply(): return "applied"\n'
PROGRAM = """
import multiprocessing, sys
import flexpatch, flexpatch.adapters
if __name__ != "__mp_main__":
    assert flexpatch.apply() == "applied" and "flexpatch.adapters.stub" in sys.modules
"""
SPAWN = PROGRAM + 'if __name__ == "__main__": multiprocessing.get_context("spawn").Pool(1).apply(flexpatch.apply)\n'
WAYS = {
    "c": ["-c", PROGRAM],
    "script": ["script.py"],
    "module": ["-m", "flexpatch.tool"],
    "spawned": ["spawn.py"],
    "pytest": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_script.py"],
}


class Installed:
    """A Python of its own in which a checkout called ``flexpatch`` is installed, and nothing else."""

    def __init__(self, folder: Path, kind: str, finder: bool) -> None:
        self.parent, self.checkout, self.elsewhere = folder, folder / "flexpatch", folder / "elsewhere"
        for name in BUILD:
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)
        for name, source in {
            "flexpatch/__init__.py": STUB,
            "flexpatch/tool.py": PROGRAM,
            "adapters/stub.py": "",
        }.items():
            (self.checkout / name).parent.mkdir(exist_ok=True)
            (self.checkout / name).write_text(source)
        if finder:  # what pyproject.toml would say without setup.py
            settings = (self.checkout / "pyproject.toml").read_text()
            changed = settings.replace('packages = ["flexpatch"', 'packages = ["flexpatch", "flexpatch.adapters"')
            changed = changed.replace('{ "" = "." }', '{ "flexpatch.adapters" = "adapters" }')
            assert changed.count("flexpatch.adapters") == settings.count("flexpatch.adapters") + 2
            (self.checkout / "pyproject.toml").write_text(changed)
            (self.checkout / "setup.py").unlink()
        self.elsewhere.mkdir()
        for place in (self.parent, self.checkout, self.elsewhere):
            for name in ("script.py", "test_script.py"):
                (place / name).write_text(PROGRAM + "def test_it(): pass\n")
            (place / "spawn.py").write_text(SPAWN)
        run(sys.executable, "-m", "venv", "--without-pip", str(folder / "env"), cwd=folder)
        build = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(folder)!r}))"
        wheel = run(sys.executable, "-c", build, cwd=self.checkout).splitlines()[-1]
        self.python = next(path for path in (folder / "env").glob("*/python*") if path.stem == "python")
        self.site = Path(
            run(str(self.python), "-c", "import site; print(site.getsitepackages()[-1])", cwd=folder).strip()
        )
        zipfile.ZipFile(folder / wheel).extractall(self.site)


def run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_licenses
@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_the_package_is_found_from_everywhere(kind: str, tmp_path: Path) -> None:
    installed = Installed(tmp_path, kind, finder=False)
    for way, arguments in WAYS.items():
        if way == "pytest":  # and what it needs, from here
            (installed.site / "here.pth").write_text(sysconfig.get_path("purelib"))
        for place in (installed.parent, installed.checkout, installed.elsewhere)[: 1 if way == "pytest" else 3]:
            run(str(installed.python), *arguments, cwd=place)
    where = run(str(installed.python), "-c", "import flexpatch; print(flexpatch.__file__)", cwd=installed.parent)
    folder = installed.checkout if kind == "editable" else installed.site
    assert where.strip() == str(folder / "flexpatch" / "__init__.py")


@needs_licenses
def test_a_finder_takes_the_checkout_for_the_package(tmp_path: Path) -> None:
    """The control: with a mapping in pyproject.toml and no setup.py, a program above the checkout fails."""
    installed = Installed(tmp_path, "editable", finder=True)
    run(str(installed.python), *WAYS["c"], cwd=installed.elsewhere)
    for way in ("c", "script", "module", "spawned"):
        with pytest.raises(AssertionError, match="module 'flexpatch' has no attribute 'apply'"):
            run(str(installed.python), *WAYS[way], cwd=installed.parent)
