"""Trains with a program of another project, as it is and with the line that docs/frameworks.md gives, and compares.

    python benchmarks/frameworks.py axolotl                    # in an environment of its own, in --folder
    python benchmarks/frameworks.py llamafactory --pip torch==2.13.0+cpu torchvision

Installs the program from PyPI with this checkout beside it, so that their requirements must agree. Then it runs ten
steps on the CPU twice, in float32, on a Llama of 3 layers of 256 units with a byte-level tokenizer: DPO on pairs of
examples/data, or SFT on prompts with many answers (verl's engine, which has no DPO). Each step's loss and all trained
weights are noted by benchmarks/recorder. The row of the program in --table is replaced. The exit code is 1 if losses
differ by more than 1e-5, weights by more than 5e-5, or if nothing was folded, as where the line does nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "frameworks.md"
HEAD = "| program | settings | losses | weights | batches folded | versions |\n|---|---|---|---|---|---|\n"
SHOWN = ("transformers", "trl", "peft", "torch")
LOSSES, WEIGHTS = 1e-5, 5e-5
STEPS, RATE = 10, 1e-4
LAUNCH = ["python", "-m", "flexpatch.launch"]


@dataclass(frozen=True)
class Client:
    """A program that trains, and how to run it.

    Attributes:
        package: Requirement for pip.
        write: Takes a folder and whether to apply flexpatch; writes configuration files there, and returns the command.
        settings: What was set, for the table.
    """

    package: str
    write: Callable[[Path, bool], list[str]]
    settings: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, compare, and write the row; the exit code is 1 if the runs differ or nothing was folded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CLIENTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/frameworks"), help="of all runs (%(default)s)")
    parser.add_argument("--environment", type=Path, help="a virtual environment that holds all: nothing is installed")
    parser.add_argument("--pip", nargs="+", default=[], metavar="REQUIREMENT", help="to install with the program")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(argv)
    client, folder = CLIENTS[options.name], (options.folder / options.name).resolve()
    environment = options.environment.resolve() if options.environment else folder / "environment"
    if not options.environment:
        prepare(environment, [*options.pip, client.package])
    python(environment, make_inputs, folder)
    stock, applied = (run(environment, client, folder, with_line) for with_line in (False, True))
    losses, weights = python(environment, compare, folder / "stock", folder / "applied")
    given = folded(applied)
    versions = ", ".join(f"{name} {version}" for name, version in python(environment, versions_of).items())
    package = client.package.replace("==", " ")
    cells = [package, client.settings, f"{losses:.1e}", f"{weights:.1e}", f"{given[0]} of {given[1]}", versions]
    write_row(options.table, cells)
    print(options.table.read_text(encoding="utf-8"))
    return int(losses > LOSSES or weights > WEIGHTS or "flexpatch: " in stock)


def folded(output: str) -> tuple[int, int]:
    """Read from a program's output how many batches of all its models were folded, and how many there were.

    Raises:
        ValueError: If no batch was.
    """
    counts = re.findall(r"flexpatch(?: rank \d+)?: .*?(\d+) of (\d+) batches folded", output)
    total = sum(int(some) for some, _ in counts), sum(int(all_) for _, all_ in counts)
    if not total[0]:
        raise ValueError(f"no batch was folded:\n{output[-3000:]}")
    return total


def write_row(table: Path, cells: list[str]) -> None:
    """Replace the row of a program and its settings in a table, or add it."""
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    kept = [line for line in lines[2:] if line.split(" | ")[:2] != [f"| {cells[0]}", cells[1]]]
    rows = sorted([*kept, f"| {' | '.join(cells)} |"])
    table.write_text(HEAD + "".join(f"{row}\n" for row in rows), encoding="utf-8")


def prepare(environment: Path, packages: list[str]) -> None:
    """Make a virtual environment, and install a program and this checkout there in one go."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "--quiet", *packages, "-e", ROOT], check=True)


def run(environment: Path, client: Client, folder: Path, applied: bool) -> str:
    """Train once, and return all that the program printed."""
    place = folder / ("applied" if applied else "stock")
    shutil.rmtree(place, ignore_errors=True)  # of an earlier run
    place.mkdir(parents=True)
    command = client.write(place, applied)
    paths = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    search = os.pathsep.join([str(ROOT / "benchmarks" / "recorder"), str(ROOT)])
    settings = dict(PATH=paths, PYTHONPATH=search, RECORD=str(place))
    settings |= dict(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", WANDB_DISABLED="true")
    done = subprocess.run(
        command, cwd=place, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    (place / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-5000:]}")
    return done.stdout


# --- run by the environment's Python ------------------------------------------------------------------------------


def python(environment: Path, function: Callable[..., Any], *paths: Path) -> Any:
    """Call a function of this file in another environment.

    Args:
        environment: A virtual environment.
        function: Takes paths, and returns JSON types.
        paths: Its arguments.

    Returns:
        Its result.
    """
    code = f"import json, frameworks; print(json.dumps(frameworks.{function.__name__}(*{[str(p) for p in paths]})))"
    search = os.pathsep.join(str(ROOT / name) for name in ("benchmarks", "tests"))
    command, variables = [environment / "bin" / "python", "-c", code], os.environ | {"PYTHONPATH": search}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-5000:])
    return json.loads(done.stdout.splitlines()[-1])


def make_inputs(folder: str) -> None:
    """Write a model, and the pairs in the form of each program, for both runs."""
    import torch
    from datasets import Dataset
    from helpers.tokenizers_offline import make_tokenizer

    from flexpatch.models import tiny_model

    tokenizer = make_tokenizer()
    model = tiny_model("llama", dtype=torch.float32)
    config = model.config
    config.vocab_size, config.num_hidden_layers, config.max_position_embeddings = len(tokenizer), 3, 4096
    # Narrower models gain too little on the dense backend, which computes all pairs of tokens.
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    config.dtype = torch.float32
    torch.manual_seed(0)
    model = type(model)(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(Path(folder) / "model")
    tokenizer.save_pretrained(Path(folder) / "model")
    lines = (ROOT / "examples" / "data" / "direct_answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{name: turns[0]["content"] for name, turns in json.loads(line).items()} for line in lines]
    rows = sorted(rows, key=lambda row: len(row["prompt"]))[-2 * STEPS :]
    # Short answers: the log-prob of a long one is a number in the thousands, whose last bit of float32 is 1e-4.
    most = dict(prompt=300, chosen=60, rejected=60)
    rows = [{name: text[: most[name] - 2 * n] for name, text in row.items()} for n, row in enumerate(rows)]
    write_json(Path(folder) / "pairs.json", rows)
    talks = [
        dict(
            messages=[
                dict(role="user", content=row["prompt"]),
                dict(role="assistant", content=row["chosen"]),
            ],
            rejected_response=row["rejected"],
        )
        for row in rows
    ]
    write_json(Path(folder) / "talks.json", talks)
    answers = [
        dict(messages=[dict(role="user", content=prompt), dict(role="assistant", content=f"{number}. {row['chosen']}")])
        for prompt in (rows[0]["prompt"], rows[1]["prompt"])
        for number, row in enumerate(rows)
    ]
    Dataset.from_list(answers).to_parquet(Path(folder) / "answers.parquet")


def compare(stock: str, applied: str) -> list[float]:
    """Return the largest differences of losses and of weights."""
    from safetensors.torch import load_file

    some, others = (json.loads((Path(place) / "losses.json").read_text()) for place in (stock, applied))
    assert len(some) == len(others) == STEPS, (some, others)
    assert max(some) - min(some) > 100 * LOSSES, f"nothing was learned: {some}"
    these, those = (load_file(Path(place) / "weights.safetensors") for place in (stock, applied))
    assert these.keys() == those.keys() and these
    losses = max(abs(a - b) for a, b in zip(some, others, strict=True))
    return [losses, max((these[name] - those[name]).abs().max().item() for name in these)]


def versions_of() -> dict[str, str]:
    """Return the versions of what a row names, where it is installed."""
    from importlib.metadata import distributions

    installed = {found.metadata["Name"].lower(): found.version for found in distributions()}
    return {name: installed[name] for name in SHOWN if name in installed}


# --- programs -----------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Write JSON, which is YAML too."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def llamafactory(place: Path, applied: bool, *, callback: bool = False, **settings: Any) -> list[str]:
    """LLaMA-Factory's command line has no hook; its function ``run_exp`` takes callbacks."""
    columns = dict(prompt="prompt", chosen="chosen", rejected="rejected")
    pairs = dict(file_name=str(place.parent / "pairs.json"), ranking=True, columns=columns)
    write_json(place / "dataset_info.json", dict(pairs=pairs))
    write_json(place / "dpo.yaml", dict(
        model_name_or_path=str(place.parent / "model"), stage="dpo", do_train=True, dataset="pairs", dataset_dir=".",
        template="default", cutoff_len=2048, output_dir="out", per_device_train_batch_size=2, max_steps=STEPS,
        learning_rate=RATE, logging_steps=1, report_to="none", save_strategy="no", seed=0, overwrite_cache=True,
    ) | settings)  # fmt: skip
    (place / "train.py").write_text(
        "import yaml\nfrom llamafactory.train.tuner import run_exp\n\n"
        "from flexpatch.callbacks import Flexpatch\n\n"
        f"run_exp(yaml.safe_load(open('dpo.yaml')), callbacks=[{'Flexpatch()' if applied else ''}])\n"
    )
    if callback:
        return ["python", "train.py"]
    return [*(LAUNCH if applied else []), "llamafactory-cli", "train", "dpo.yaml"]


def swift(place: Path, applied: bool, **settings: Any) -> list[str]:
    """ms-swift imports plugins by their path."""
    plugin = ROOT / "flexpatch" / "integrations" / "swift" / "flexpatch_plugin.py"
    given = dict(
        rlhf_type="dpo", model=place.parent / "model", model_type="llama", template="dummy", max_length=2048,
        dataset=place.parent / "talks.json", torch_dtype="float32", per_device_train_batch_size=2, max_steps=STEPS,
        learning_rate=RATE, logging_steps=1, report_to="none", save_strategy="no", seed=0, output_dir="out",
        gradient_accumulation_steps=1, split_dataset_ratio=0, use_hf="true",
    ) | settings  # fmt: skip
    given |= dict(external_plugins=plugin, callbacks="flexpatch") if applied else {}
    return ["swift", "rlhf", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def axolotl(place: Path, applied: bool, **settings: Any) -> list[str]:
    """axolotl imports plugins that its YAML file names."""
    fields = dict(field_prompt="prompt", field_chosen="chosen", field_rejected="rejected")
    pairs = dict(path=str(place.parent / "pairs.json"), ds_type="json", split="train", type=fields)
    write_json(place / "dpo.yaml", dict(
        base_model=str(place.parent / "model"), rl="dpo", datasets=[pairs], sequence_len=2048, micro_batch_size=2,
        gradient_accumulation_steps=1, max_steps=STEPS, num_epochs=1, optimizer="adamw_torch", learning_rate=RATE,
        lr_scheduler="cosine", bf16=False, fp16=False, tf32=False, output_dir="out", dataset_prepared_path="prepared",
        val_set_size=0, seed=0, save_strategy="no", logging_steps=1,
    ) | settings | (dict(plugins=["flexpatch.integrations.axolotl.Plugin"]) if applied else {}))  # fmt: skip
    return ["axolotl", "train", "dpo.yaml", "--launcher", "python"]


def trl(place: Path, applied: bool, **settings: Any) -> list[str]:
    """TRL's command line has no hook."""
    data = place / "data"
    data.mkdir(exist_ok=True)
    (data / "train.json").write_text((place.parent / "pairs.json").read_text())
    given = dict(
        model_name_or_path=place.parent / "model", dataset_name=data, per_device_train_batch_size=2, max_steps=STEPS,
        learning_rate=RATE, logging_steps=1, report_to="none", save_strategy="no", seed=0, output_dir="out",
        use_cpu="true", bf16="false",
    ) | settings  # fmt: skip
    command = ["trl", "dpo", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]
    return [*(LAUNCH if applied else []), *command]


def verl(place: Path, applied: bool, **settings: Any) -> list[str]:
    """verl imports a module that its configuration names. Its SFT trainer runs the engine of its PPO actors."""
    given = {
        "data.train_files": place.parent / "answers.parquet", "data.train_batch_size": 8, "data.num_workers": 0,
        "data.use_dynamic_bsz": False, "data.micro_batch_size_per_gpu": 8, "data.ignore_input_ids_mismatch": True,
        "model.path": place.parent / "model", "+model.override_config.attn_implementation": "sdpa",
        "engine.strategy": "fsdp2", "+engine.mixed_precision": "{param_dtype: fp32}", "engine.use_torch_compile": False,
        "optim.lr": RATE, "trainer.device": "cpu", "trainer.logger": "[console]", "trainer.resume_mode": "disable",
        "trainer.total_training_steps": STEPS, "trainer.default_local_dir": place / "out",
    } | settings  # fmt: skip
    given |= {"model.external_lib": "flexpatch.integrations.verl"} if applied else {}
    program = ROOT / "benchmarks" / "recorder" / "verl_on_cpu.py"
    start = ["torchrun", "--standalone", "--nproc_per_node", "1", str(program)]
    return [*start, *(f"{name}={value}" for name, value in given.items())]


def using(write: Callable[..., list[str]], **settings: Any) -> Callable[[Path, bool], list[str]]:
    """Fix settings of a program."""
    return lambda place, applied: write(place, applied, **settings)


CLIENTS = {
    "llamafactory": Client("llamafactory==0.9.5", using(llamafactory, finetuning_type="lora"), "DPO, LoRA"),
    "llamafactory-full": Client("llamafactory==0.9.5", using(llamafactory, finetuning_type="full"), "DPO, all weights"),
    "llamafactory-callback": Client(
        "llamafactory==0.9.5", using(llamafactory, finetuning_type="lora", callback=True), "DPO, LoRA, callback"
    ),
    "swift": Client("ms-swift==4.6.0", using(swift, tuner_type="lora", lora_dropout=0), "DPO, LoRA"),
    "swift-full": Client("ms-swift==4.6.0", using(swift, tuner_type="full"), "DPO, all weights"),
    "axolotl": Client(
        "axolotl==0.19.0",
        using(axolotl, adapter="lora", lora_r=8, lora_alpha=16, lora_target_linear=True, lora_dropout=0.0),
        "DPO, LoRA",
    ),
    "axolotl-full": Client("axolotl==0.19.0", axolotl, "DPO, all weights"),
    "verl": Client("verl[verl-core]==0.9.1", verl, "SFT, 20 answers a prompt, remove_padding"),
    "verl-padded": Client(
        "verl[verl-core]==0.9.1", using(verl, **{"model.use_remove_padding": False}), "SFT, 20 answers a prompt, padded"
    ),
    "trl": Client("trl==1.16.0", using(trl, use_peft="true"), "DPO, LoRA"),
    "trl-full": Client("trl==1.16.0", trl, "DPO, all weights"),
}

if __name__ == "__main__":
    sys.exit(main())
