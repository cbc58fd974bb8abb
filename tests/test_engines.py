"""Under accelerate's engines on two CPU ranks: the weights that one rank of the unpatched model trains."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import needs_engines
from helpers.example_runs import small_run
from helpers.oracle import float64_norm, float64_rope
from helpers.processes import PROGRAMS, ROOT, start_python, torchrun
from programs import picture_ranks, tensor_ranks
from programs.engine_ranks import CASES, Weights, save_model, train, vector
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

CONFIGS = ROOT / "examples" / "accelerate"
TITLES = {
    "ddp": ("DDP", "float64: within 1e-10, or twice the stock trainer's error"),
    "fsdp2": ("FSDP2", "float64: within 1e-10, or twice the stock trainer's error"),
    "zero3": ("DeepSpeed ZeRO-3", "float32: within twice the stock trainer's error"),
}
needs_deepspeed = pytest.mark.heavy("deepspeed")
ENGINES = [pytest.param(name, marks=[needs_deepspeed] if name == "zero3" else []) for name in TITLES]
TORCHRUN = ["torchrun_fsdp2.json", "torchrun_zero3.json"]
STARTS = [
    pytest.param(name, marks=[needs_deepspeed] if "zero3" in name else [])
    for name in ("ddp.yaml", "fsdp2.yaml", "zero3.yaml", "torchrun", *TORCHRUN)
]
FAST = ["one line, lora", "packed", "own rows", "answers see each other"]  # one of each trainer, and the control
EXACT = 1e-10
# A broken case must be at least this many bounds off.
CONTROL = 1000


@pytest.fixture(autouse=True)
def float64_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", float64_rope)
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


def accelerate(config: str, ranks: int = 2) -> list[str]:
    """Python's arguments that start a program on CPU ranks with one of the example's files."""
    command = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    return [*command, "--main_process_port", "0", "--num_processes", str(ranks)]


def launch(engine: str, script: Path, *arguments: object, fails: bool = False, **options: object) -> str:
    """What a script prints (or its errors) under an engine, in the precision of its model. Options: of the launcher."""
    device = dict(ACCELERATE_USE_CPU="true") if engine == "ddp" else dict(ACCELERATE_TORCH_DEVICE="cpu")
    program = [str(PROGRAMS / "cpu_ranks.py"), str(script), *map(str, arguments)]
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [*accelerate(f"{engine}.yaml"), "--mixed_precision", "no", *given, *program]
    done = start_python(command, script.parent, device, fails=fails)
    return done.stderr if fails else done.stdout


def cases_of(engine: str) -> list[str]:
    """The cases of an engine. ZeRO-3 refuses compiled layers and recomputes whole ones, and float32 tells nothing of
    delta rules: there the stock model's own rounding is a hundredth of what training changes. A second training in the
    same process finds no engine of DeepSpeed, unpatched either."""
    names = [name for name, case in CASES.items() if case.patched]
    without = [name for name in names if "compile" in CASES[name].options or CASES[name].model_type == "qwen3_5_text"]
    without += [name for name in names if CASES[name].options.get("recompute_layers") == "partly" or CASES[name].twice]
    return [name for name in names if not (engine == "zero3" and name in without)]


def table() -> str:
    """Table of docs/distributed.md: what is tested under each engine, and how near its weights are to one rank's."""
    kinds = {"one line": "`DPOTrainer`", "packed": "`PackedDPOTrainer`", "own rows": "rows of your own"}
    options = {
        "accumulation": "gradient accumulation",
        "recompute_layers=2": "`recompute_layers=2`",
        "recompute_layers=partly": '`recompute_layers="partly"`',
        "recompute_layers=auto": '`recompute_layers="auto"`',
        "reentrant": "reentrant checkpointing",
        "compile": "`compile=True`",
    }
    hybrids = dict(lfm2="LFM2", bamba="Bamba", qwen3_5_text="Qwen3.5")
    lines = ["| engine | all weights, and LoRA | with | weights, against one rank's |", "|---|---|---|---|"]
    for engine, (title, bound) in TITLES.items():
        names = cases_of(engine)
        trainers = ", ".join(kind for name, kind in kinds.items() if {name, f"{name}, lora"} <= set(names))
        more = ", ".join(option for name, option in options.items() if name in names)
        types = [title for kind, title in hybrids.items() if {f"{kind}, unshared", f"{kind}, branched"} <= set(names)]
        more += f", mixers on separate sequences and states that branch ({', '.join(types)})"
        shown = {picture_ranks.CASES[name].kind for group in pictures_of(engine) for name in PICTURES[group]}
        more += f", images ({', '.join(title for kind, title in PICTURED.items() if kind in shown)})"
        lines.append(f"| {title} | {trainers} | {more} | {bound} |")
    kinds = {"batches": "batches of a plain loop", "rows": "rows of your own"}
    split = ", ".join(kind for name, kind in kinds.items() if name in tensor_ranks.CASES)
    lines.append(f'| tensor parallelism (`tp_plan="auto"`) | {split}; all weights alone | | float64: within 1e-10 |')
    return "\n".join(lines) + "\n"


def example(start: str, folder: Path, *arguments: str) -> str:
    """What examples/trl_dpo.py prints: alone, or on two ranks that accelerate or torchrun started."""
    program = [str(ROOT / "examples" / "trl_dpo.py"), *arguments]
    device = dict(ACCELERATE_TORCH_DEVICE="cpu")
    if start in ("alone", "ddp.yaml", "torchrun"):  # accelerate has these on CPUs by itself
        device = dict(ACCELERATE_USE_CPU="true")
    if start in ("ddp.yaml", "torchrun"):
        (folder / "cpu.json").write_text('{"use_cpu": true}')
        program += ["--settings", str(folder / "cpu.json")]
    if start.endswith(".yaml"):
        program = [*accelerate(start), str(PROGRAMS / "cpu_ranks.py"), *program]
    elif start != "alone":
        settings = ["--settings", str(CONFIGS / start)] if start in TORCHRUN else []
        program = [*torchrun(), *program, *settings]
    return start_python(program, folder, device).stdout


def losses(output: str) -> list[float]:
    (line,) = re.findall(r"^losses: (.*)$", output, re.MULTILINE)  # of the first rank alone
    return [float(loss) for loss in line.split(", ")]


def compare(engine: str, tmp_path: Path, names: list[str], **options: object) -> dict[str, float]:
    """How far each case's weights are from one rank's, over what training changed there in float64."""
    truth, folder = tmp_path / "float64", tmp_path / engine
    save_model(truth, torch.float64)
    dtype = "float32" if engine == "zero3" else "float64"
    save_model(folder, getattr(torch, dtype))
    launch(engine, PROGRAMS / "engine_ranks.py", dtype, folder, folder, *names, **options)
    trained: dict[str, tuple[Weights, Weights]] = {}
    errors = {}
    for name in names:
        key = CASES[name].truth_name()
        if key not in trained:
            trained[key] = train(CASES[key], truth, torch.float64)
        before, true = trained[key]
        _, ours = torch.load(folder / f"{name}.pt")
        assert ours.keys() == true.keys(), ours.keys() ^ true.keys()
        weights = list(true)
        change = vector(true, weights) - vector(before, weights)
        errors[name] = float((vector(ours, weights) - vector(true, weights)).norm() / change.norm())
    print("ERRORS", engine, {name: f"{error:.1e}" for name, error in errors.items()})
    return errors


def check(engine: str, tmp_path: Path, names: list[str], **options: object) -> None:
    """In float64 within 1e-10; where a stock trainer itself, under the same engine, is further from one rank (TRL takes
    log-probs in float32, which other micro-batches round otherwise; ZeRO-3 is float32 throughout), twice as far."""
    yardsticks = [CASES[name].yardstick() for name in names]
    errors = compare(engine, tmp_path, list(dict.fromkeys(yardsticks + names)), **options)
    for name, yardstick in zip(names, yardsticks, strict=True):
        bound = max(EXACT, 2 * errors[yardstick])
        assert errors[yardstick] < 1e-4, f"{yardstick} is {errors[yardstick]} off by itself"
        if CASES[name].broken:
            assert errors[name] > CONTROL * bound, f"{name}, yet the weights are only {errors[name]} off"
        else:
            assert errors[name] <= bound, f"{name}: {errors[name]} off; {yardstick}: {errors[yardstick]}"


@needs_engines
def test_ranks_train_what_one_rank_trains(tmp_path: Path) -> None:
    """Under FSDP2, which does more to a model than DDP and needs no further package."""
    check("fsdp2", tmp_path, FAST)


@needs_engines
@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if "fsdp2" not in engine.values])
def test_ranks_of_other_engines_train_it_too(engine: str, tmp_path: Path) -> None:
    check(engine, tmp_path, FAST)


@needs_engines
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_other_cases(engine: str, tmp_path: Path) -> None:
    check(engine, tmp_path, [name for name in cases_of(engine) if name not in FAST])


# PackedDPOTrainer weights micro-batches in float32.
PACKED = 1e-6
PICTURED = dict(qwen2_5_vl="Qwen2.5-VL", gemma3="Gemma 3", llava="LLaVA")
PICTURES = {
    "qwen2_5_vl": [f"qwen2_5_vl, {name}" for name in ("one line", "own rows", "taken as equal", "lora")],
    "qwen2_5_vl, more": [f"qwen2_5_vl, {name}" for name in ("frozen tower", "as given on a rank", "refused on a rank")],
    "recomputation": ["qwen2_5_vl, recompute layers", "qwen2_5_vl, recompute layers auto"],
    "compiled": ["qwen2_5_vl, compile", "gemma3, compile"],
    "others": [
        f"{kind}, {name}" for kind in ("gemma3", "llava") for name in ("one line", "own rows", "taken as equal")
    ],
    "packed": ["qwen2_5_vl, packed"],
    "images on a rank": ["qwen2_5_vl, images on a rank"],
}


def pictures_of(engine: str) -> list[str]:
    """The groups of an engine. FSDP2 and ZeRO-3 gather a tower's weights on all ranks at once, and so fail in stock
    training where one of them has no images; ZeRO-3 refuses compiled layers and packed images."""
    without = dict(ddp=[], fsdp2=["images on a rank"], zero3=["images on a rank", "compiled", "packed"])[engine]
    return [group for group in PICTURES if group not in without]


@needs_engines
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "group"),
    [pytest.param(*each.values, group, marks=each.marks) for each in ENGINES for group in pictures_of(*each.values)],
)
def test_images(engine: str, group: str, tmp_path: Path) -> None:
    """Losses and weights of the unpatched model under the same engine: in float64; under ZeRO-3, which is float32, no
    further from one rank's in float64 than twice as far as those."""
    names, wide = PICTURES[group], engine != "zero3"
    dtype = torch.float64 if wide else torch.float32
    picture_ranks.save_models(tmp_path, dtype, {picture_ranks.CASES[name].kind for name in names})
    script = PROGRAMS / "picture_ranks.py"
    launch(engine, script, str(dtype).removeprefix("torch."), tmp_path, tmp_path, *names)
    for name in names:
        case = picture_ranks.CASES[name]
        losses, before, weights = torch.load(tmp_path / f"{name}.pt")
        stock_losses, _, stock = torch.load(tmp_path / f"{picture_ranks.stock_name(name)}.pt")
        if not wide:
            true_losses, before, true = picture_ranks.train(case.stock(), tmp_path, torch.float64)
        else:
            true_losses, true = stock_losses, stock
        changed = vector(true, list(true)) - vector(before, list(true))
        assert weights.keys() == stock.keys() == true.keys() and changed.norm() > 0.1
        found, own = (
            [
                float((vector(each, list(true)) - vector(true, list(true))).norm() / changed.norm()),
                max(abs(a - b) for a, b in zip(logged, true_losses, strict=True)),
            ]
            for logged, each in ((losses, weights), (stock_losses, stock))
        )
        print("ERRORS", engine, name, [f"{error:.1e}" for error in found], [f"{error:.1e}" for error in own])
        exact = PACKED if case.trainer == "packed" else EXACT
        bounds = [max(exact, 2 * error) for error in own] if wide else [2 * max(own)] * 2
        if case.equal:
            assert found[0] > CONTROL * bounds[0] and found[1] > 10 * bounds[1], found
        else:
            assert all(error <= bound for error, bound in zip(found, bounds, strict=True)), (name, found, own)


def distance(ours: Any, true: Any) -> float:
    """The relative distance of two results: of all numbers in a list, or of all tensors by name."""
    if isinstance(true, dict):
        assert ours.keys() == true.keys(), ours.keys() ^ true.keys()
        ours, true = ([tensors[name].flatten() for name in true] for tensors in (ours, true))
    ours, true = (torch.cat([torch.as_tensor(x, dtype=torch.float64).flatten() for x in xs]) for xs in (ours, true))
    return float((ours - true).norm() / true.norm())


@needs_engines
def test_tensor_parallelism(tmp_path: Path) -> None:
    """Two ranks that split every layer train what one rank of the unpatched model trains: losses, log-probs of all
    steps, gradients of the first, weights after the last."""
    save_model(tmp_path, torch.float64)
    program = [str(PROGRAMS / "tensor_ranks.py"), "float64", str(tmp_path), str(tmp_path), *tensor_ranks.CASES]
    start_python([*torchrun(), *program], tmp_path)
    true = tensor_ranks.train("stock", tmp_path)
    for name in tensor_ranks.CASES:
        ours = torch.load(tmp_path / f"{name}.pt")
        errors = {kind: distance(ours[kind], true[kind]) for kind in true}
        print("ERRORS", name, {kind: f"{error:.1e}" for kind, error in errors.items()})
        if name == "answers see each other":
            assert min(errors.values()) > CONTROL * EXACT, errors
        else:
            assert max(errors.values()) < EXACT, (name, errors)


@needs_engines
@pytest.mark.slow
def test_layers_that_stay_whole_behind_their_forward(tmp_path: Path) -> None:
    """FSDP2 leaves them so if asked. A second training still trains adapters that were switched off and on."""
    check("fsdp2", tmp_path, ["packed, lora, twice"], fsdp_reshard_after_forward="false")


@needs_engines
@pytest.mark.slow
def test_adapters_of_another_dtype_under_fsdp2(tmp_path: Path) -> None:
    """Peft's, in float32 on weights of 16 bits. FSDP2 settles its dtypes by what the first forward trains."""
    save_model(tmp_path, torch.bfloat16)
    launch("fsdp2", PROGRAMS / "engine_ranks.py", "bfloat16", tmp_path, tmp_path, "packed, lora")
    before, after = torch.load(tmp_path / "packed, lora.pt")
    adapters = [name for name in before if "lora_" in name]
    assert adapters and {after[name].dtype for name in adapters} == {torch.float32}
    assert vector(after, adapters).isfinite().all()
    assert not torch.equal(vector(after, adapters), vector(before, adapters))


@needs_engines
@needs_deepspeed
@pytest.mark.slow
def test_packed_images_under_zero3_are_refused(tmp_path: Path) -> None:
    picture_ranks.save_models(tmp_path, torch.float32, ["qwen2_5_vl"])
    arguments = ("float32", tmp_path, tmp_path, "qwen2_5_vl, packed")
    assert "ZeRO-3: use FSDP2 or DDP" in launch("zero3", PROGRAMS / "picture_ranks.py", *arguments, fails=True)


@needs_engines
@needs_deepspeed
@pytest.mark.slow
def test_compiled_layers_under_zero3_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, torch.float32)
    script = PROGRAMS / "engine_ranks.py"
    error = launch("zero3", script, "float32", tmp_path, tmp_path, "compile", fails=True)
    assert "UnsupportedModelError" in error and "DeepSpeed's ZeRO-3 gathers weights in them" in error


@needs_engines
@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_the_example(start: str, tmp_path: Path) -> None:
    """In bfloat16, as the files say, with LoRA: three steps, whose losses are those of one rank but for rounding."""
    arguments = [*small_run(tmp_path), "--lr", "0.01", "--steps", "3"]
    ours = losses(example(start, tmp_path, *arguments, "--batch-size", "2"))
    stock = losses(example("alone", tmp_path, *arguments, "--batch-size", "4", "--off"))
    assert len(ours) == 3 and abs(stock[0] - stock[-1]) > 0.3
    assert ours == pytest.approx(stock, abs=0.03)


def test_the_page() -> None:
    """The table of engines lists what is tested here, and the commands name files that exist."""
    assert (ROOT / "benchmarks" / "results" / "engines.md").read_text() == table()
    named = set(re.findall(r"examples/[\w/.]+", (ROOT / "docs" / "distributed.md").read_text()))
    assert {f"examples/accelerate/{path.name}" for path in CONFIGS.iterdir()} <= named
    assert all((ROOT / name).exists() for name in named)


if __name__ == "__main__":
    print(table(), end="")
