"""Adapters of other packages: found through their entry point, and as good as our own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexpatch.registry import adapters

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "examples" / "adapter_package"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the example package, as pip would lay it out."""
    for module in PACKAGE.glob("*.py"):
        shutil.copy(module, tmp_path)
    info = tmp_path / "flexpatch_nanochat-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flexpatch-nanochat\nVersion: 0.1.0\n")
    entry = (PACKAGE / "pyproject.toml").read_text().split('[project.entry-points."flexpatch.adapters"]\n')[1]
    (info / "entry_points.txt").write_text("[flexpatch.adapters]\n" + entry.split("\n\n")[0].replace('"', "") + "\n")
    return tmp_path


def verify(folder: Path, model_type: str = "nanochat") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexpatch.verify", model_type],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("model_type", ["nanochat", pytest.param("ema_llama", marks=pytest.mark.slow)])
def test_the_example_package_is_found_and_verified(model_type: str, installed: Path) -> None:
    found = verify(installed, model_type)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{model_type} (tiny random model 1 of 1)" in found.stdout


@pytest.mark.slow
def test_a_record_that_forgets_a_mixer_is_caught(installed: Path) -> None:
    module = installed / "flexpatch_ema.py"
    module.write_text(module.read_text().replace("unshared=", "# unshared="))
    wrong = verify(installed, "ema_llama")
    assert wrong.returncode == 1 and "PARITY FAILS" in wrong.stdout, wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_a_wrong_package_is_refused(installed: Path) -> None:
    module = installed / "flexpatch_nanochat.py"
    module.write_text(module.read_text().replace("logit_transform=", "# logit_transform="))
    wrong = verify(installed)
    assert wrong.returncode == 2 and "its adapter does not say how" in wrong.stderr, wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_a_broken_package_is_named_and_harms_no_other(installed: Path) -> None:
    (installed / "flexpatch_nanochat.py").write_text("import a_module_that_is_missing")
    program = "import flexpatch.registry as r; print(len(r.adapters()))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed}"},
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and int(run.stdout) == len(adapters()) + len(["ema_llama"]), run.stderr
    assert "the adapter 'nanochat' of the package flexpatch-nanochat" in run.stderr
    assert "No module named 'a_module_that_is_missing'" in run.stderr
    assert verify(installed, "olmo2").returncode == 0
    asked_for = verify(installed, "nanochat")
    assert asked_for.returncode == 2 and "the package flexpatch-nanochat" in asked_for.stderr, asked_for.stderr


def test_the_documentation_shows_the_package() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text()
    shown = page.split("<!-- adapter package -->")[1].split("<!-- end adapter package")[0]
    assert (PACKAGE / "flexpatch_nanochat.py").read_text() in shown
    assert '[project.entry-points."flexpatch.adapters"]\nnanochat = "flexpatch_nanochat"' in shown
