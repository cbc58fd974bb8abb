"""The parts of a public project: what sdist and wheel hold, versions that agree, forms that ask for reports."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.needs import needs_licenses
from parameterized import parameterized

import flexpatch

ROOT = Path(__file__).resolve().parent.parent
# What a checkout holds that is neither tracked nor packed.
LEFT_OUT = [".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", "site", "shared", ".*_cache"]
# Folders that tests read, tests themselves included.
READ = (".ci", ".github", "adapters", "benchmarks", "docs", "examples", "flexpatch", "tests")
FORMS = ("bug_report.yml", "new_architecture.yml", "wrong_number.yml")


def text(*path: str) -> str:
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


def files(root: Path) -> set[str]:
    """Every file of the folders that tests read, by its path."""
    found = (path for folder in READ for path in (root / folder).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in found if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build") / "flexpatch"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


def build(kind: str, checkout: Path) -> Path:
    """Build a wheel or an sdist with what is installed, as pip does in an environment of its own."""
    program = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(checkout.parent)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr.lower(), done.stderr
    return checkout.parent / done.stdout.splitlines()[-1]


@needs_licenses
def test_an_sdist_holds_all_that_its_tests_read(checkout: Path) -> None:
    expected = files(checkout)
    assert {"tests/test_publishing.py", "adapters/llama.py", ".ci/run", "examples/data/dialogues.json"} <= expected
    with tarfile.open(build("sdist", checkout)) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert expected - held == set()
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"} <= held
    assert not [name for name in held if name.endswith(".pyc")]


@needs_licenses
def test_a_wheel_holds_the_library_and_nothing_else(checkout: Path) -> None:
    path = build("wheel", checkout)
    with zipfile.ZipFile(path) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = archive.read(f"flexpatch-{flexpatch.__version__}.dist-info/METADATA").decode()
    library = {str(file.relative_to(checkout)) for file in (checkout / "flexpatch").rglob("*") if file.is_file()}
    adapters = {f"flexpatch/adapters/{file.name}" for file in (checkout / "adapters").glob("*.py")}
    assert held == library | adapters
    assert {"flexpatch/py.typed", "flexpatch/launched/sitecustomize.py"} <= held and len(adapters) > 10
    assert "License-Expression: Apache-2.0" in about and "Project-URL: Issues, https://" in about


def test_versions_agree() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == flexpatch.__version__
    released = f"## [{flexpatch.__version__}] - {citation['date-released']}"
    headings = re.findall(r"^## .*$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "## [Unreleased]" and released in headings
    for heading in headings:
        name = re.findall(r"\[(.*?)\]", heading)[0]
        assert f"\n[{name}]: https://" in text("CHANGELOG.md"), "each version is a link"


@parameterized.expand(FORMS)
def test_forms_ask_for_both_reports(name: str) -> None:
    form: dict[str, Any] = yaml.safe_load(text(".github", "ISSUE_TEMPLATE", name))
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert "python -m flexpatch.verify NAME --json" in fields["verify"]["attributes"]["label"]
    assert "python -m flexpatch.env" in fields["env"]["attributes"]["label"]
    assert fields["env"]["validations"]["required"]


def test_all_forms_are_looked_at() -> None:
    found = {path.name for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()}
    assert found == {*FORMS, "config.yml"}


def test_the_workflow_lints_first() -> None:
    workflow = yaml.safe_load(text(".github", "workflows", "ci.yml"))
    jobs = workflow["jobs"]
    assert workflow["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu")
    assert all(job.get("needs") == "lint" for name, job in jobs.items() if name != "lint")
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert "ruff check ." in steps["lint"] and "mkdocs build --strict" in steps["docs"]
    assert ".ci/run" in steps["tests"] and "twine check --strict dist/*" in steps["build"]
    scripts = {each["script"] for each in jobs["oldest-and-newest"]["strategy"]["matrix"]["include"]}
    for script in (*scripts, ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} can be executed"
