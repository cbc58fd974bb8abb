"""Nothing that comes with a model or a dataset runs, unless it was asked for by name."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tokenizers_offline import CHAT_TEMPLATE, make_tokenizer
from packaging.requirements import Requirement
from packaging.version import Version
from parameterized import parameterized
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import flexpatch
from flexpatch import Collator, FlexpatchError, estimate, verify
from flexpatch.models import load_config, load_model, load_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parent.parent
F32 = torch.float32

# What could run text or data as code. ``compile`` and ``eval`` of models and regular expressions are attributes.
CALLS = {"eval", "exec", "compile", "__import__", "input"}
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "subprocess",
    "runpy",
    "code",
    "yaml",
}
ATTRIBUTES = {
    "os.system",
    "os.popen",
    "os.execv",
    "os.execve",
    "os.spawnv",
    "pty.spawn",
    "torch.load",
    "np.load",
    "numpy.load",
}
# Programs whose only purpose is to run another, which the user names; and a benchmark that runs the project's example.
ALLOWED = {
    ("benchmarks/hh.py", "subprocess"),
    ("benchmarks/first_step.py", "subprocess"),
    ("benchmarks/frameworks.py", "subprocess"),
    ("benchmarks/scaling.py", "subprocess"),
    ("flexpatch/launch.py", "subprocess"),
    ("flexpatch/launch.py", "os.execve"),
}


def dangers(source: str) -> set[str]:
    """Names in a program that could run data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module.split(".")[0]} & MODULES
            found |= {f"{module}.{alias.name}" for alias in node.names} & ATTRIBUTES
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            found |= {name} & CALLS | (set() if safe else {name} & ATTRIBUTES)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            found |= {f"{k}=True" for k in ("allow_pickle", "trust_remote_code") if options.get(k) == "True"}
    return found


@parameterized.expand(["flexpatch", "adapters", "examples", "benchmarks"])
def test_no_program_runs_data(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {(str(f.relative_to(ROOT)), danger) for f in files for danger in dangers(f.read_text(encoding="utf-8"))}
    assert found <= ALLOWED


@parameterized.expand(
    ["eval('1')", "import pickle", "from subprocess import run", "import os\nos.system('x')", "torch.load(path)",
     "torch.load(path, weights_only=False)", "load(name, trust_remote_code=True)", "from torch import load",
     "np.load(path, allow_pickle=True)", "__import__(name)"],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert dangers(source)


def test_the_search_finds_no_more() -> None:
    assert not dangers("model.eval(); torch.compile(f); re.compile(p); torch.load(path, weights_only=True)")


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that only code from a model could have written."""
    return tmp_path / "it ran"


class Evil:
    """A pickle of it writes the marker when it is read."""

    def __init__(self, marker: Path) -> None:
        self.command = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"

    def __reduce__(self) -> Any:
        return exec, (self.command,)


def evil_pickle(path: Path, marker: Path) -> None:
    torch.save({"model.norm.weight": Evil(marker)}, path)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_model("llama", dtype=F32).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def pickled(model_dir: Path) -> Path:
    """The same weights as a pickle."""
    whole = load_file(model_dir / "model.safetensors")
    torch.save(whole, model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()
    return model_dir


def test_the_pickle_of_these_tests_is_dangerous(tmp_path: Path, marker: Path) -> None:
    evil_pickle(tmp_path / "evil.bin", marker)
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert marker.exists()
    marker.unlink()
    pickle.load(io.BytesIO(pickle.dumps(Evil(marker))))
    assert marker.exists()


@pytest.mark.parametrize("where", ["alone", "shards", "index", "configuration", "adapter", "a .pt file"])
def test_pickles_are_refused(where: str, model_dir: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever transformers would read one: also named by a safetensors index, by config.json, or as an adapter."""
    weights = model_dir / "model.safetensors"
    file = {"adapter": "adapter_model.bin", "a .pt file": "weights.pt", "shards": "pytorch_model-1.bin"}.get(
        where, "pytorch_model.bin"
    )
    evil_pickle(model_dir / file, marker)
    if where == "index":
        names = dict.fromkeys(load_file(weights), file)
        (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    if where == "configuration":
        settings = json.loads((model_dir / "config.json").read_text())
        (model_dir / "config.json").write_text(json.dumps(settings | {"transformers_weights": file}))
    if where == "adapter":
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(model_dir)
    else:
        weights.unlink()
    with pytest.raises(
        FlexpatchError, match=rf"has weights in {file}: pickles may run code .*allow_pickle=True \(--allow-pickle\)"
    ):
        load_model(str(model_dir), F32)
    assert verify.main([str(model_dir)]) == 2
    assert file in capsys.readouterr().err
    # Asked for, it is read by torch's restricted unpickler, which does not run it either.
    with pytest.raises(FlexpatchError, match="cannot load"):
        load_model(str(model_dir), F32, allow_pickle=True)
    assert not marker.exists()


def test_a_pickle_that_is_allowed(model_dir: Path) -> None:
    true = load_model(str(model_dir), F32).state_dict()
    pickled(model_dir)
    with pytest.raises(FlexpatchError, match=r"pytorch_model\.bin"):
        load_model(str(model_dir), F32)
    read = load_model(str(model_dir), F32, allow_pickle=True).state_dict()
    assert read.keys() == true.keys() and all(torch.equal(read[name], true[name]) for name in true)
    assert verify.main([str(model_dir), "--allow-pickle"]) == 0


def test_adapters_beside_a_model_are_read_from_safetensors(model_dir: Path) -> None:
    lora = get_peft_model(
        load_model(str(model_dir), F32), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(model_dir)
    assert any("lora" in name for name, _ in load_model(str(model_dir), F32).named_modules())


@pytest.mark.parametrize("change", ["lost", "renamed"])
def test_weights_that_are_missing_are_not_random_ones(change: str, model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights if change == "lost" else weights | {"model.layers.1.mlp.up.weight": lost}, path, {"format": "pt"})
    with pytest.raises(FlexpatchError, match=r"lacks 1 of the model's weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(model_dir), F32)


@pytest.mark.parametrize("name", ["", " ", "pytorch_model.bin"])
def test_a_file_is_no_model(name: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pickled(model_dir))
    for load in (load_config, load_tokenizer):
        with pytest.raises(FlexpatchError, match="is not a model; expected a hub name, a directory or a GGUF file"):
            load(name)


# Code that comes with a model --------------------------------------------------------------------------------------


@pytest.fixture
def with_code(model_dir: Path, marker: Path) -> Path:
    """A model whose configuration, tokenizer and classes are in a file of its own."""
    touch = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    program = touch + "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    program += "class C(LlamaConfig): pass\nclass M(LlamaForCausalLM): config_class = C\n"
    program += "class T(PreTrainedTokenizerFast): pass\n"
    (model_dir / "evil.py").write_text(program)
    settings = json.loads((model_dir / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (model_dir / "config.json").write_text(json.dumps(settings | {"auto_map": auto_map}))
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    return model_dir


def data(folder: Path) -> str:
    path = folder / "pairs.jsonl"
    path.write_text('{"prompt": "The cat", "chosen": " sat", "rejected": " ran"}\n')
    return str(path)


LIBRARY = """
import sys, torch
from itertools import product
from pathlib import Path
from flexpatch import models
folder, marker = sys.argv[1], Path(sys.argv[2])
loads = ((models.load_tokenizer, []), (models.load_config, []), (models.load_model, [torch.float32]))
for trusted, (load, more) in product((False, True), loads):
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]
    try:
        load(folder, *more, trust_remote_code=trusted)
    except models.FlexpatchError:
        pass
    assert marker.exists() == trusted, load
    marker.unlink(missing_ok=True)
"""


@pytest.mark.parametrize(
    "way", ["library", *(pytest.param(way, marks=pytest.mark.slow) for way in ("verify", "estimate"))]
)
def test_code_of_a_model_runs_only_when_asked_for(way: str, with_code: Path, marker: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    model = str(with_code)
    arguments = {
        "library": ["-c", LIBRARY, model, str(marker)],
        "verify": ["-m", "flexpatch.verify", model],
        "estimate": ["-m", "flexpatch.estimate", data(with_code), "--tokenizer", model, "--model", model, "--no-plot"],
    }[way]

    def run(*flag: str) -> int:
        # transformers asks on the terminal where nothing is said: the answer would be yes.
        return subprocess.run(
            [sys.executable, *arguments, *flag], env=env, input=b"y\n" * 9, capture_output=True
        ).returncode

    # The estimate needs a tokenizer that exists only as code; the library's program asks for code and does not, checks
    # for itself, and sweeps up.
    assert run() == (2 if way == "estimate" else 0) and not marker.exists()
    if way != "library":
        assert run("--trust-remote-code") == 0 and marker.exists()


# Data --------------------------------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "Cat?"}]
ROW: dict[str, Any] = dict(
    prompt=TALK, chosen=[{"role": "assistant", "content": "a"}], rejected=[{"role": "assistant", "content": "b"}]
)
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.exec(CODE) }}",
    "{{ raise_exception.__globals__['__builtins__']['exec'](CODE) }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' + MARKER) }}",
    "{{ lipsum.__globals__['os'].system('touch ' + MARKER) }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% set _ = messages.append(1) %}",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("where", ["tokenizer", "row"])
def test_chat_templates_run_in_a_sandbox(template: str, where: str, marker: Path) -> None:
    """A tokenizer's own, and one that a dataset row brings along; the error names the row."""
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    template = template.replace("CODE", repr(code)).replace("MARKER", repr(str(marker))) + CHAT_TEMPLATE
    tokenizer, row = make_tokenizer(), ROW
    if where == "tokenizer":
        tokenizer.chat_template = template
    else:
        row = ROW | {"chat_template_kwargs": {"chat_template": template}}
    with pytest.raises(FlexpatchError, match=r"^sample 3: the tokenizer failed: "):
        Collator(tokenizer).layout(row, 3)
    assert not marker.exists()
    assert len(Collator(make_tokenizer()).layout(ROW, 3).answers) == 2


def test_rows_are_json_alone(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(FlexpatchError, match=r"rows\.jsonl, line 1: "):
        flexpatch.read_jsonl(path)
    path.write_text(f"__import__('pathlib').Path({str(marker)!r}).touch()\n")
    assert estimate.main([str(path), "--no-plot"]) == 2
    assert not marker.exists()


# Releases -----------------------------------------------------------------------------------------------------------


def test_the_table_of_environments_names_the_lowest_releases() -> None:
    """As tested: the lower bounds of today's pyproject.toml, all that a CPU can test."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors: dict[str, Version] = {}
    extras = {
        name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs", "fa4")
    }
    for requirement in map(Requirement, [*project["dependencies"], *chain(*extras.values())]):
        if requirement.name != "flexpatch":
            (floor,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
            floors[requirement.name] = min(floor, floors.get(requirement.name, floor))
    table = (ROOT / "benchmarks" / "results" / "environments.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    shown = {row[0]: Version(Version(row[1]).public) for row in rows if row[0] in floors}
    assert shown == floors
