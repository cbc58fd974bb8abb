"""Run a program with every causal language model that transformers loads in it patched.

    python -m flexpatch.launch trl dpo --model_name_or_path ...      # a console command
    python -m flexpatch.launch --shared-dropout train.py --lr 1e-5   # a script
    python -m flexpatch.launch -m torch.distributed.run train.py     # a module

For programs whose code is not yours. Processes that the program starts with this Python are covered too: accelerate,
torchrun, Ray. flexpatch.apply patches each model when it is loaded, and all models of a trainer when training begins.
A model that is refused runs as it is, and one line says why. At the end each process prints to the standard error what
folding saved. Files and packages stay as they are: all changes end with the program, whose exit code is passed on.
"""

import argparse
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Holds a sitecustomize.py, which Python runs in each process that finds it.
FOLDER = Path(__file__).with_name("launched")
# Names the environment variable that carries the options to other processes, written as for the command line.
OPTIONS = "FLEXPATCH_OPTIONS"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Start the program that a command line names, in place of this process."""
    parser = _options_parser()
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ...", help="run a module")
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="SCRIPT.py or a console command"
    )
    given = list(sys.argv[1:] if argv is None else argv)
    parsed = parser.parse_args(given)
    rest = getattr(parsed, "module", None) or parsed.program
    if not rest:
        parser.error("no program was given")
    command = [sys.executable, "-m", *rest] if hasattr(parsed, "module") else _command(rest)
    if command is None:
        parser.error(f"there is no console command {rest[0]!r} on the path; a script's name ends in .py")
    own = given[: len(given) - len(rest) - hasattr(parsed, "module")]
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(FOLDER))]
    paths = os.pathsep.join([str(FOLDER), *others])
    environment = os.environ | {OPTIONS: shlex.join(own), "PYTHONPATH": paths}
    if os.name == "nt":  # where a process cannot become another
        import subprocess

        sys.exit(subprocess.run(command, env=environment).returncode)
    os.execve(command[0], command, environment)


def options_of_environment() -> dict[str, Any]:
    """Read the options of :func:`flexpatch.apply` that ``FLEXPATCH_OPTIONS`` holds; without it there are none."""
    return vars(_options_parser().parse_args(shlex.split(os.environ.get(OPTIONS, ""))))


def _options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m flexpatch.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--backend", choices=("auto", "flex", "fa4", "dense"), help="of rows (auto)")
    add("--compile", action="store_true", help="compile decoder layers for rows on the flex backend")
    add("--recompute-layers", type=_layers, metavar="N | partly | auto", help="layers to recompute (all)")
    add("--shared-dropout", action="store_true", help="accept dropout, whose draws answers share on shared tokens")
    return parser


def _layers(text: str) -> int | str:
    return text if text in ("auto", "partly") else int(text)


def _command(program: list[str]) -> list[str] | None:
    """Find a script or a console command. Commands of this Python's environment come first."""
    if program[0].endswith(".py"):
        return [sys.executable, *program]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(program[0], path=path)
    return None if found is None else [found, *program[1:]]


if __name__ == "__main__":
    main()
