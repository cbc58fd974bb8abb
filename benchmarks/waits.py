"""Shows where a step of a trainer goes: kernels by class, and what the host does while the GPU waits for it.

    python benchmarks/waits.py --modes stock packed                  # on a GPU
    python benchmarks/waits.py --render runs/waits/waits.json --branch 0.5        # table and trees again
    python benchmarks/waits.py --sets hh --device cpu --shape tiny --dtype float32 --budget 2048

Trains as benchmarks/trainers.py does: packed with recompute_layers="auto", the other modes without gradient
checkpointing. During one warm step, as the GPU runs it (the host may be ahead), a thread notes the main thread's Python
functions every millisecond, and torch's profiler notes when kernels run. Where none runs for longer than --least, the
notes of that time are added up: by who asked for the work (GROUPS), and as a tree of callers without branches under
--branch ms. Frames that only hand a call on are left out, and walks that call themselves are one frame. A note stands
for the idle time over the number of notes, 1.5 to 2 ms. On a CPU, which is a dry run, all time counts as idle.

Prints the trees and the table, and writes waits.json (with all notes), table.md and SET_MODE.txt to --output.
"""

import argparse
import json
import shlex
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lengths import add_lengths
from torch.autograd import DeviceType
from train import by_class
from trainers import MODES, PRECOMPUTED, SHAPES, conditions_of, mark_of, measure, seconds_between, settings_of
from transformers import TrainerCallback

Stack = tuple[str, ...]  # frames as module:function:line, callers first

# Who asks for what the host does: the first group that has any frame of a stack.
GROUPS = {
    "peft: adapters off and on": (
        "trl.trainer.utils:use_adapter",
        "peft.peft_model:disable_adapter",
        "peft.tuners.tuners_utils:disable_adapter_layers",
        "peft.tuners.tuners_utils:enable_adapter_layers",
        "flexpatch.adapters_off:_is_off",
    ),
    "TRL: checkpointing off and on, unwrapping": (
        "trl.models.utils:disable_gradient_checkpointing",
        "accelerate.utils.modeling:is_peft_model",
        "accelerate.utils.other:extract_model_from_parallel",
    ),
    "Trainer: train(), clipping, counting, zero_grad, data": (
        "torch.nn.modules.module:train",
        "transformers.trainer:_clip_grad_norm",
        "transformers.trainer:floating_point_ops",
        "torch.nn.modules.module:zero_grad",
        "transformers.trainer:get_batch_samples",
        "flexpatch.trl:get_batch_samples",
    ),
    "flexpatch's hooks": ("flexpatch.forward:",),
}
REST = "rest"
LEAST_MS = 0.3  # a shorter time without a kernel is not called idle
NCCL_ALONE = "NCCL alone"  # a class of kernels: no other runs meanwhile
ROOT = "transformers.trainer:_run_epoch:"
# Frames that hand a call on.
PASSING = (
    "accelerate.utils.operations:",
    "contextlib:",
    "torch._compile:",
    "torch._dynamo.eval_frame:",
    "torch.amp.autocast_mode:",
    "torch.autograd.function:apply",
    "torch.nn.modules.module:_call_impl",
    "torch.nn.modules.module:_wrapped_call_impl",
    "torch.nn.modules.module:inner",
    "torch.nn.utils.clip_grad:_no_grad_wrapper",
    "torch.optim.lr_scheduler:wrapper",
    "torch.optim.optimizer:wrapper",
    "torch.utils._contextlib:",
    "transformers.utils.deprecation:",
    "transformers.utils.generic:wrapper",
    "transformers.utils.output_capturing:wrapper",
)
WALKS = ("__repr__", "named_modules", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--render", type=Path, metavar="JSON", help="measure nothing: waits.json of an earlier call")
    add("--sets", nargs="+", default=["hh", "gsm8k_4shot"])
    add("--modes", nargs="+", choices=(*MODES, *PRECOMPUTED), default=["packed"])
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--batch-size", type=int, default=8, help="of all modes but packed (%(default)s)")
    add("--bins", type=int, default=4, help="packed batches an epoch (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a packed batch (%(default)s)")
    add("--least", type=float, default=LEAST_MS, metavar="MS", help="shortest time without a kernel (%(default)s)")
    add("--branch", type=float, default=2.0, metavar="MS", help="least of a branch that is shown (%(default)s)")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/waits"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.render.read_text()) if options.render else measure_all(options)
    for run in results["runs"]:
        name = f"{run['set']}, {run['mode']}"
        text = "\n".join(tree(stacks_of(run), options.branch))
        (options.output / f"{name.replace(', ', '_').replace(' ', '_')}.txt").write_text(text + "\n")
        print(f"\n{name}\n{text}")
    (options.output / "table.md").write_text(table(results))
    print(f"\n{table(results)}", flush=True)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Watch a step of every set and mode, and write waits.json after each."""
    settings = settings_of(options, pairs=3 * options.batch_size)
    lengths = json.loads(options.lengths.read_text())
    words = ["LENGTHS.json" if word == str(options.lengths) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/waits.py", *words]).split(" --output")[0]
    conditions = (
        f"{conditions_of(settings)}; DPOTrainer with lengths of real datasets, LoRA on all linear layers, reference "
        f"pass by adapter off; stock: {options.batch_size} pairs a batch, nothing recomputed; packed: "
        f'{options.budget:,} tokens a batch, compiled layers, recompute_layers="auto". `{command}`'
    )
    results: dict[str, Any] = dict(conditions=conditions, least_ms=options.least, runs=[])
    for name in options.sets:
        for mode in options.modes:
            waits = Waits(options.least, options.device)
            recompute = mode.startswith("packed")
            record = measure(settings, mode, lengths[name], options.batch_size, recompute, callbacks=[waits])
            shown = dict(set=name, mode=mode, pairs=record["pairs_per_step"], steps_ms=record["steps_ms"])
            results["runs"].append(shown | waits.found)
            (options.output / "waits.json").write_text(json.dumps(results, indent=1))
    return results


class Kernel(NamedTuple):
    """A kernel that ran once, with the names of the profiler's sums."""

    key: str
    self_device_time_total: float
    device_type: Any = DeviceType.CUDA
    is_user_annotation: bool = False


class Waits(TrainerCallback):
    """Watches the second epoch's third step, as the GPU runs it: from when it ended the second, to when it ends it.

    The host may run ahead of the GPU. So all are watched from the end of the first step on, and the host waits for the
    GPU at the end of the third.
    """

    def __init__(self, least_ms: float, device: str) -> None:
        self.least = 1e6 * least_ms
        self.on_gpu = device == "cuda"
        self.wait = torch.get_device_module(device).synchronize
        self.profile: Any = None
        self.found: dict[str, Any] = {}
        self.notes: list[tuple[int, Stack]] = []
        self.over = threading.Event()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        step = state.global_step - state.max_steps // 2
        if step == 1:
            kinds = torch.profiler.ProfilerActivity
            self.profile = torch.profiler.profile(
                activities=[kinds.CUDA if self.on_gpu else kinds.CPU], acc_events=True
            )
            self.profile.start()
            sys.setswitchinterval(2e-4)  # a note must not wait until the main thread gives way
            threading.Thread(target=self.note, args=(threading.get_ident(),), daemon=True).start()
        elif step == 2:
            self.mark = mark_of(self.on_gpu)
        elif step == 3:
            self.finish(mark_of(self.on_gpu))

    def note(self, thread: int) -> None:
        """Write down another thread's frames until the step is over."""
        while not self.over.wait(1e-3):
            now, frame, frames = time.time_ns(), sys._current_frames().get(thread), []
            while frame is not None:
                frames.append(f"{frame.f_globals.get('__name__')}:{frame.f_code.co_name}:{frame.f_lineno}")
                frame = frame.f_back
            self.notes.append((now, tuple(reversed(frames))))

    def finish(self, mark: Any) -> None:
        """Find the times without kernels, and add up the notes of them."""
        self.wait()
        end = time.time_ns()
        self.over.set()
        sys.setswitchinterval(5e-3)
        self.profile.stop()
        begin = end - int(1e9 * seconds_between(self.mark, mark))
        events = [e for e in self.profile.profiler.kineto_results.events() if e.device_type().name == "CUDA"]
        events = [e for e in events if e.start_ns() >= begin and not e.is_user_annotation()]
        own = [e for e in events if not e.name().startswith("nccl")]
        kernels = by_class(Kernel(e.name(), e.duration_ns() / 1e3) for e in own)
        found = gaps_between(events, begin, end)
        if len(own) < len(events):
            kernels[NCCL_ALONE] = total_ms(gaps_between(own, begin, end)) - total_ms(found)
        self.profile = None
        gaps = [(start, stop) for start, stop in found if stop - start > self.least]
        idle = [stack for now, stack in self.notes if any(start <= now < stop for start, stop in gaps)]
        idle_ms = total_ms(gaps)
        counts = Counter(map(shortened, idle)).most_common()
        self.found = dict(
            watched_ms=(end - begin) / 1e6, kernels=kernels, idle_ms=idle_ms, gaps=len(gaps), notes=len(idle),
            stacks=[[count * idle_ms / len(idle), stack] for stack, count in counts],
        )  # fmt: skip


def gaps_between(events: Iterable[Any], begin: int, end: int) -> list[tuple[int, int]]:
    """List the times without a kernel, in nanoseconds."""
    gaps, last = [], begin
    for start, stop in [*sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events), (end, end)]:
        if start > last:
            gaps.append((last, start))
        last = max(last, stop)
    return gaps


def total_ms(gaps: Iterable[tuple[int, int]]) -> float:
    return sum(stop - start for start, stop in gaps) / 1e6


def shortened(stack: Stack) -> Stack:
    """Begin at the training loop, leave out frames that hand a call on, and make one of a walk that calls itself."""
    at = next((place for place, frame in enumerate(stack) if frame.startswith(ROOT)), 0)
    short: list[str] = []
    for frame in stack[at:]:
        function = frame.split(":")[1]
        again = function in WALKS and bool(short) and short[-1].split(":")[1] == function
        if not (again or frame.startswith(PASSING)):
            short.append(frame)
    return tuple(short)


def stacks_of(run: Mapping[str, Any]) -> dict[Stack, float]:
    """Read the milliseconds of each stack from a record."""
    return {tuple(stack): ms for ms, stack in run["stacks"]}


def tree(stacks: Mapping[Stack, float], least: float, indent: str = "") -> list[str]:
    """Add milliseconds up by caller, and indent callees."""
    branches: defaultdict[str, defaultdict[Stack, float]] = defaultdict(lambda: defaultdict(float))
    for stack, ms in stacks.items():
        if stack:
            branches[stack[0]][stack[1:]] += ms
    lines = []
    for frame, below in sorted(branches.items(), key=lambda branch: -sum(branch[1].values())):
        if (ms := sum(below.values())) >= least:
            lines += [f"{indent}{ms:.1f} {frame}", *tree(below, least, indent + "  ")]
    return lines


def group_of(stack: Iterable[str]) -> str:
    """Find who asks for the work of a stack."""
    frames = tuple(stack)
    for group, askers in GROUPS.items():
        if any(frame.startswith(askers) for frame in frames):
            return group
    return REST


def cells_of(run: Mapping[str, Any], kinds: Iterable[str]) -> list[str]:
    """Write the milliseconds of a watched step: of its kernels by class, without any, and of all of it."""
    idle, watched = run["idle_ms"], run["watched_ms"]
    kernels = [f"{run['kernels'].get(kind, 0):.0f}" for kind in kinds]
    return [*kernels, f"{idle:.0f} ({idle / watched:.0%})", f"{watched:.0f}"]


def table(results: dict[str, Any]) -> str:
    """Write the kernels of each step by class, and below them the groups that its idle time belongs to."""
    runs = results["runs"]
    kinds, groups = list(runs[0]["kernels"]), [*GROUPS, REST]
    steps = [f"| ms of a step | pairs | {' | '.join(kinds)} | GPU idle | all |", "|---" * (len(kinds) + 4) + "|"]
    waits = [f"| ms while the GPU idles | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for run in runs:
        name = f"{run['set']}, {run['mode']}"
        steps.append(f"| {name} | {run['pairs']:.0f} | {' | '.join(cells_of(run, kinds))} |")
        spent = dict.fromkeys(groups, 0.0)
        for stack, ms in stacks_of(run).items():
            spent[group_of(stack)] += ms
        cells = [f"{ms:.0f} ({ms / run['idle_ms']:.0%})" for ms in spent.values()]
        waits.append(f"| {name} | {' | '.join(cells)} |")
    notes = ", ".join(str(run["notes"]) for run in runs)
    text = (
        f"*Pairs*: of a step, on average. *GPU idle*: {results['least_ms']} ms or more without a kernel; below, who "
        f"asks for what the host does meanwhile, by {notes} samples of the functions that it runs.\n\n"
        f"Conditions: {results['conditions']}"
    )
    return "\n".join([*steps, "", *waits, "", text]) + "\n"


if __name__ == "__main__":
    main()
