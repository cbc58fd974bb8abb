"""Lists what the host does while the GPU waits for it, in a step of a trainer.

    python benchmarks/waits.py LENGTHS.json --sets hh gsm8k_4shot --modes stock packed    # on a GPU

Trains as benchmarks/trainers.py does. In a warm step a thread notes the main thread's Python functions every
millisecond, and torch's profiler notes when kernels run. Where no kernel runs for longer than --least, the notes of that
time are added up, function by function: a tree of callers and milliseconds, without branches under --branch ms. Prints
the trees, and writes waits.json and waits_SET_MODE.txt to --output.
"""

import argparse
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from trainers import MODES, SHAPES, TrainerCallback, by_class, measure

ROOT = "training_step", "_run_epoch", "_inner_training_loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lengths", type=Path)
    add("--sets", nargs="+", default=["hh", "gsm8k_4shot"])
    add("--modes", nargs="+", choices=MODES, default=["packed"])
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--batch-size", type=int, default=8, help="of stock and one line (%(default)s)")
    add("--bins", type=int, default=4)
    add("--budget", type=int, default=16384)
    add("--least", type=float, default=0.3, metavar="MS", help="shortest time without a kernel (%(default)s)")
    add("--branch", type=float, default=2.0, metavar="MS", help="least of a branch that is shown (%(default)s)")
    add("--output", type=Path, default=Path("runs/waits"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    fixed = dict(device="cuda", dtype="bfloat16", full=False, lora="all-linear", quick=False, precompute=False)
    settings = argparse.Namespace(**vars(options), **fixed, pairs=2 * options.batch_size)
    lengths, results = json.loads(options.lengths.read_text()), []
    for name in options.sets:
        for mode in options.modes:
            waits = Waits(options.least)
            record = measure(settings, mode, lengths[name], options.batch_size, mode == "packed", callbacks=[waits])
            text = "\n".join(tree(waits.stacks, options.branch))
            results.append(dict(set=name, mode=mode, steps_ms=record["steps_ms"], **waits.found))
            print(f"\n{name}, {mode}: {json.dumps(results[-1])}\n{text}", flush=True)
            (options.output / f"waits_{name}_{mode.replace(' ', '_')}.txt").write_text(text)
            (options.output / "waits.json").write_text(json.dumps(results, indent=1))


class Waits(TrainerCallback):
    """Watches the second epoch's second step; times of an unwatched one come from the trainer's clock."""

    def __init__(self, least_ms: float) -> None:
        self.least = 1e6 * least_ms
        self.profile: Any = None
        self.stacks: Counter[tuple[str, ...]] = Counter()
        self.found: dict[str, Any] = {}
        self.samples: list[tuple[int, tuple[str, ...]]] = []
        self.over = threading.Event()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Begin after the step before, so that the loading of data is seen."""
        if self.profile is not None:
            self.finish()
        elif not self.found and state.global_step == state.max_steps // 2 + 1:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
            self.profile.start()
            torch.cuda.synchronize()
            sys.setswitchinterval(2e-4)  # a sample must not wait until the main thread gives way
            self.begin = time.time_ns()
            threading.Thread(target=self.sample, args=(threading.main_thread().ident,), daemon=True).start()

    def sample(self, thread: int) -> None:
        while not self.over.wait(1e-3):
            frame, names = sys._current_frames().get(thread), []
            now = time.time_ns()
            while frame is not None:
                code = frame.f_code
                names.append(f"{Path(code.co_filename).stem}:{code.co_name}:{frame.f_lineno}")
                frame = frame.f_back
            self.samples.append((now, tuple(reversed(names))))

    def finish(self) -> None:
        torch.cuda.synchronize()
        end = time.time_ns()
        self.over.set()
        sys.setswitchinterval(5e-3)
        self.profile.stop()
        kinds = by_class(self.profile.key_averages())
        events = [e for e in self.profile.profiler.kineto_results.events() if e.device_type().name == "CUDA"]
        self.profile = None
        busy = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in events)
        gaps, last = [], self.begin
        for start, stop in [*busy, (end, end)]:
            if start - last > self.least:
                gaps.append((last, start))
            last = max(last, stop)
        for now, stack in self.samples:
            if any(start <= now < stop for start, stop in gaps):
                self.stacks[shortened(stack)] += 1
        idle = sum(stop - start for start, stop in gaps) / 1e6
        total = sum(self.stacks.values())
        for stack in self.stacks:
            self.stacks[stack] *= idle / max(total, 1)  # type: ignore[assignment]
        self.found = dict(watched_ms=(end - self.begin) / 1e6, idle_ms=idle, gaps=len(gaps), samples=total, **kinds)


def shortened(stack: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out what is above the training loop, and torch's calls of modules."""
    at = next((i for i, name in enumerate(stack) if name.split(":")[1] in ROOT), 0)
    return tuple(name for name in stack[at:] if not name.startswith(("module:_wrapped", "module:_call", "contextlib")))


def tree(stacks: Counter[tuple[str, ...]], least: float) -> list[str]:
    """Add milliseconds up by caller, and indent callees."""
    sums: Counter[tuple[str, ...]] = Counter()
    for stack, ms in stacks.items():
        for depth in range(1, min(len(stack), 14) + 1):
            sums[stack[:depth]] += ms

    def lines(prefix: tuple[str, ...]) -> list[str]:
        found = []
        under = [stack for stack in sums if len(stack) == len(prefix) + 1 and stack[: len(prefix)] == prefix]
        for stack in sorted(under, key=lambda stack: -sums[stack]):
            if sums[stack] >= least:
                found += [f"{'  ' * len(prefix)}{sums[stack]:.1f} {stack[-1]}", *lines(stack)]
        return found

    return lines(())


if __name__ == "__main__":
    main()
