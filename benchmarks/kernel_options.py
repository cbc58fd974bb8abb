"""Compares options of FlexAttention's kernels on packed rows: tiles, stages, warps, loads, blocks of the mask, and FA4.

    python benchmarks/kernel_options.py                           # on a GPU, about four minutes
    python benchmarks/kernel_options.py --heads 128 --rows 16384  # the most telling part
    python benchmarks/kernel_options.py --device cpu              # a dry run, forward alone
    python benchmarks/kernel_options.py --render runs/kernel_options/kernel_options.json  # its table again

Times attention alone, forward and backward, in Mistral-7B's shape (32 query heads, 8 of keys; with --heads 64 of half
the width) over shared rows of --rows tokens: pairs with lengths of real sets, pairs of one length, and one long
document (a prompt of three quarters of the row and two answers of an eighth). Options of forward and of backward are
compiled together, but are independent: the fastest of each are compared again, together, on longer rows.

*Ideal* is the fastest kernel for separate sequences, divided by the ratio of visible pairs of tokens. Every trial is
compared with a float32 softmax on one row: *error* is the largest relative error of output and gradients over that of
torch's own options, and a trial over --worse times that is wrong. Exit code 1 if torch's own options are.

*Saved* counts 32 layers, forward twice (a reference runs too), over a step of as many tokens: of --rest seconds without
attention for 16,384 tokens, and attention by torch's own options.

Trials are compiled by --workers processes at once, and timed one after the other. Prints results as they come; writes
kernel_options.json and table.md to --output after every phase. Tables only name what is wrong, or faster nowhere.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layers import PAIRED, Pair, Row, Setup, attempt, attention_ms, line, make_row, milliseconds
from lengths import add_lengths
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from train import draw_pairs

from flexpatch.masks import BLOCK, block_mask, bucket, mask_mod
from flexpatch.rows import build_rows
from flexpatch.tree import Tree

DOCUMENT = "one document"
UNIFORM = {
    "512 + 2 x 128": (512, 128, 128),
    "1,024 + 2 x 256": (1024, 256, 256),
    "2,048 + 2 x 512": (2048, 512, 512),
}
SMALL_HEADS = 64
LAYERS = 32
OWN = "torch's own"
FA4 = "FA4"
LARGE = (BLOCK, BLOCK)
FORWARD = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
BACKWARD = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
# Tiles that fit into a Hopper's shared memory, most of them without spilling registers (as lowered for it without one).
# Forward and backward of a line are compiled together.
GRID = [
    ((128, 64, 8, 2), (64, 128, 128, 64, 8, 2)),
    ((128, 128, 8, 2), (64, 64, 64, 64, 8, 2)),
    ((128, 64, 4, 3), (32, 128, 128, 32, 8, 2)),
    ((64, 64, 4, 3), (64, 64, 128, 64, 8, 3)),
    ((64, 128, 4, 2), (64, 64, 64, 64, 4, 2)),
    ((128, 32, 4, 3), (64, 64, 64, 64, 8, 3)),
    ((64, 64, 4, 2), (32, 64, 64, 32, 4, 3)),
    ((128, 64, 8, 4), (32, 128, 128, 32, 8, 3)),
    ((128, 32, 8, 4), (64, 128, 64, 64, 8, 2)),
]
# Loads by the tensor memory accelerator.
GRID_TMA = [
    ((128, 64, 8, 3), (64, 128, 128, 64, 8, 2)),
    ((128, 128, 8, 2), (64, 64, 64, 64, 4, 2)),
    ((64, 64, 4, 3), (64, 64, 64, 64, 8, 2)),
    ((128, 64, 4, 3), (64, 128, 128, 64, 8, 3)),
]
BLOCKS = [(64, 64), (128, 64), (64, 128)]


@dataclass(frozen=True)
class Trial:
    """Name options of a forward and of a backward kernel, for masks of one block size."""

    name: str
    blocks: tuple[int, int] = LARGE
    options: dict[str, Any] = field(default_factory=dict)

    def pick(self, prefix: str) -> dict[str, Any]:
        """Return the options of one kernel, with those of both."""
        other = {"fwd_": "bwd_", "bwd_": "fwd_"}[prefix]
        return {name: value for name, value in self.options.items() if not name.startswith(other)}


def tiles_of_blocks(blocks: tuple[int, int]) -> dict[str, int]:
    """Choose options with which kernels read the tables of a mask of small blocks that passes for one of large ones."""
    queries, keys = blocks
    tiles = {"SPARSE_Q_BLOCK_SIZE": queries, "SPARSE_KV_BLOCK_SIZE": keys}
    tiles |= {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": min(keys, 64), "fwd_num_warps": queries // 16}
    tiles |= {"bwd_BLOCK_M1": min(queries, 64), "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": queries}
    return tiles | {"bwd_BLOCK_N2": min(keys, 64), "bwd_num_warps": max(queries, keys) // 16, "bwd_num_stages": 2}


def trials(heads: int) -> list[Trial]:
    """List all options to compare on one head size, the most promising first."""
    found = [Trial(OWN)]
    found += [Trial(FA4, options={"BACKEND": "FLASH"})]
    found += [
        Trial("TMA" if not i else f"TMA, {short(f)}; {short(b)}", options=prefixed(f, b) | {"USE_TMA": True})
        for i, (f, b) in enumerate(GRID_TMA)
    ]
    found += [Trial(f"blocks {q} x {kv}", (q, kv), tiles_of_blocks((q, kv))) for q, kv in BLOCKS]
    found += [Trial(f"{short(f)}; {short(b)}", options=prefixed(f, b)) for f, b in GRID]
    narrow = tiles_of_blocks((64, 64))
    found += [Trial("blocks 64 x 64, 3 stages", (64, 64), narrow | {"fwd_num_stages": 2, "bwd_num_stages": 3})]
    found += [Trial("blocks 64 x 64, TMA", (64, 64), narrow | {"USE_TMA": True})]
    found += [Trial("PRESCALE_QK", options={"PRESCALE_QK": True})]
    return found


def short(tiles: Sequence[int]) -> str:
    *sizes, warps, stages = tiles
    return f"{' '.join(map(str, sizes))} w{warps} s{stages}"


def prefixed(forward: Sequence[int], backward: Sequence[int]) -> dict[str, Any]:
    found = {f"fwd_{name}": value for name, value in zip(FORWARD, forward, strict=True)}
    return found | {f"bwd_{name}": value for name, value in zip(BACKWARD, backward, strict=True)}


# --- in a worker ------------------------------------------------------------------------------------------------------


def small_block_mask(ends: Tensor, positions: Tensor, blocks: tuple[int, int]) -> BlockMask:
    """Make a mask of small blocks; on a GPU it passes for one of 128 x 128, with the tables that it has.

    Torch (2.11 to 2.13) has no backward kernel for blocks that its own tiles do not divide, whichever tiles are asked
    for. It takes the true sizes as options of the kernels: :func:`tiles_of_blocks`.
    """
    size, device = ends.shape[1], ends.device
    mask = create_block_mask(mask_mod(ends, positions, None), 1, 1, size, size, device=str(device), BLOCK_SIZE=blocks)
    if device.type == "cpu":
        return mask
    names = [f"{which}_{table}" for which in ("kv", "full_kv", "q", "full_q") for table in ("num_blocks", "indices")]
    tables: dict[str, Any] = {name: getattr(mask, name) for name in names}
    return BlockMask(seq_lengths=mask.seq_lengths, **tables, BLOCK_SIZE=LARGE, mask_mod=mask.mask_mod)


def compiled(trial: Trial) -> Callable[..., Tensor]:
    """Compile attention with a trial's options. A function of its own, so that graphs are not looked up among many."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=trial.options)  # type: ignore[call-overload]

    return torch.compile(attend, fullgraph=True, dynamic=False)


def inputs_of(setup: Setup, length: int) -> list[Tensor]:
    """Draw q, k, v and the gradient of the output, the same ones in all processes; tokens first in memory."""
    generator = torch.Generator(setup.device).manual_seed(length)
    size, H, G = (setup.shape[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    tensors = []
    for heads in (H, G, G, H):
        x = torch.randn(1, length, heads, size, device=setup.device, generator=generator).to(setup.dtype)
        tensors.append(x.transpose(1, 2))
    return tensors


class Timer:
    """Hold a worker's compiled trials for one length, and time them when asked."""

    def __init__(self, setup: Setup, cases: dict[str, list[Pair]]) -> None:
        self.setup = setup
        self.rows = {name: rows_of(pairs).to(setup.device) for name, pairs in cases.items()}
        self.length = bucket(max(rows.input_ids.shape[1] for rows in self.rows.values()))
        *self.qkv, self.gradient = inputs_of(setup, self.length)
        for x in self.qkv:
            x.requires_grad_(setup.train)
        self.functions: dict[str, Callable[..., Tensor]] = {}

    def mask(self, trial: Trial, name: str) -> BlockMask:
        ends, positions = padded(self.rows[name], self.length)
        if trial.blocks == LARGE:
            return block_mask(ends, positions, None)
        return small_block_mask(ends, positions, trial.blocks)

    def compile(self, trial: Trial) -> float:
        """Compile a trial. Returns seconds."""
        start = time.perf_counter()
        if "BACKEND" in trial.options:
            importlib.import_module("flash_attn.cute")  # on a CPU torch would ignore the option
        self.functions[trial.name] = compiled(trial)
        self.run(trial, self.mask(trial, next(iter(self.rows))))
        return time.perf_counter() - start

    def run(self, trial: Trial, mask: BlockMask) -> list[Tensor]:
        with torch.set_grad_enabled(self.setup.train):
            out = self.functions[trial.name](*self.qkv, mask)
        gradients = torch.autograd.grad(out, self.qkv, self.gradient) if self.setup.train else ()
        return [out.detach(), *gradients]

    def time(self, trial: Trial) -> dict[str, list[float | None]]:
        """Time a trial on all rows. Returns milliseconds of forward and of backward by row."""
        times: dict[str, list[float | None]] = {}
        for name in self.rows:
            mask = self.mask(trial, name)
            call = partial(self.functions[trial.name], *self.qkv, mask)
            forward = milliseconds(self.setup, call, self.qkv, backward=False)
            both = milliseconds(self.setup, call, self.qkv) if self.setup.train else None
            times[name] = [forward, None if both is None else both - forward]
        return times

    def error(self, trial: Trial, name: str, truth: list[Tensor]) -> list[float]:
        """Return relative errors of output and gradients, by norm."""
        found = self.run(trial, self.mask(trial, name))
        return [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=False)]


def rows_of(pairs: Sequence[Pair]) -> Any:
    return build_rows([[Tree.of([1] * p, [2] * c, [3] * r) for p, c, r in pairs]])


def padded(rows: Any, length: int) -> tuple[Tensor, Tensor]:
    """Pad a row's ends and positions to a length, with tokens that see themselves alone."""
    ends = torch.arange(1, length + 1, dtype=torch.int32, device=rows.ends.device)[None].contiguous()
    ends[:, : rows.ends.shape[1]] = rows.ends
    positions = torch.zeros_like(ends)
    positions[:, : rows.ends.shape[1]] = rows.position_ids
    return ends, positions


def work(channel: Any, options: argparse.Namespace) -> None:
    """Serve a worker's requests: (command, arguments) to an answer, or the words of an error."""
    prepare(options)
    timer: Timer | None = None
    truth: list[Tensor] | None = None
    while (request := channel.recv()) is not None:
        command, *arguments = request
        try:
            if command == "rows":
                timer, truth = None, None
                torch._dynamo.reset()
                heads, cases = arguments
                timer = Timer(setup_of(options, heads), cases)
                answer: Any = timer.length
            elif command == "separate":
                heads, cases = arguments
                answer = {name: baseline(setup_of(options, heads), pairs) for name, pairs in cases.items()}
            else:
                assert timer is not None
                if command == "error" and truth is None:
                    held = load_file(arguments.pop(), device=str(timer.setup.device))
                    truth = [held[name] for name in sorted(held)]
                answer = getattr(timer, command)(*arguments[:2], *([truth] if command == "error" else []))
            channel.send(("done", answer))
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            channel.send(("failed", words if options.brief else words + traceback.format_exc()))


def prepare(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # workers are processes already
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512


def setup_of(options: argparse.Namespace, heads: int) -> Setup:
    count = (32, 8) if options.device == "cuda" else (4, 2)
    shape = dict(num_attention_heads=count[0], num_key_value_heads=count[1], head_dim=heads)
    return Setup(torch.device(options.device), getattr(torch, options.dtype), shape, 0, options.deadline)


# --- in the main process ----------------------------------------------------------------------------------------------


class Workers:
    """Send requests to several processes, or serve them here if there are none."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.channels, self.processes = [], []
        for _ in range(options.workers):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, options), daemon=True)
            process.start()
            self.channels.append(here)
            self.processes.append(process)
        self.home: dict[str, int] = {}
        self.active = 0

    def all(self, count: int, *request: Any) -> None:
        """Have the first ``count`` workers do one thing, and wait."""
        self.active = min(count, max(1, len(self.channels) - 1))  # the last one times separate sequences
        for channel in self.channels[: self.active]:
            channel.send(request)
        for channel in self.channels[: self.active]:
            status, answer = channel.recv()
            if status == "failed":
                raise SystemExit(answer)

    def compile(self, found: Sequence[Trial], deadline: float) -> dict[str, str]:
        """Compile trials side by side. Returns reasons of those that failed."""
        waiting, busy, failed = list(found), {}, {}
        while waiting or busy:
            for i, channel in enumerate(self.channels[: self.active]):
                if i not in busy and waiting:
                    busy[i] = waiting.pop(0)
                    channel.send(("compile", busy[i]))
            for i in list(busy):
                if self.channels[i].poll(0.05):
                    status, answer = self.channels[i].recv()
                    trial = busy.pop(i)
                    self.home[trial.name] = i
                    if status == "failed":
                        failed[trial.name] = answer
                        print(f"  {trial.name}: {answer}", flush=True)
                    else:
                        print(f"  {trial.name}: compiled in {answer:.0f} s", flush=True)
            if time.monotonic() > deadline:
                left = [trial.name for trial in (*waiting, *busy.values())]
                print(f"  out of time to compile {', '.join(left)}", flush=True)
                return failed | dict.fromkeys(left, "out of time")
        return failed

    def ask(self, command: str, trial: Trial, *arguments: Any) -> tuple[bool, Any]:
        channel = self.channels[self.home[trial.name]]
        channel.send((command, trial, *arguments))
        status, answer = channel.recv()
        return status == "done", answer

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


def truth_of(setup: Setup, pairs: list[Pair], length: int, path: Path) -> None:
    """Save output and gradients of a float32 softmax over one row, in chunks of queries."""
    rows = rows_of(pairs).to(setup.device)
    ends, _ = padded(rows, length)
    q, k, v, gradient = (x[0].float() for x in inputs_of(setup, length))
    group = q.shape[0] // k.shape[0]
    keys = torch.arange(length, device=setup.device)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for g in range(k.shape[0]):
        heads = slice(g * group, (g + 1) * group)
        for queries in keys.split(1024):
            visible = (keys <= queries[:, None]) & (queries[:, None] < ends[0])
            part = heads, slice(int(queries[0]), int(queries[-1]) + 1)
            scores = (q[part] @ k[g].mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
            share = scores.softmax(-1)
            out[part] = share @ v[g]
            dv[g] += (share.mT @ gradient[part]).sum(0)
            slope = gradient[part] @ v[g].mT
            slope = share * (slope - (gradient[part] * out[part]).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            dq[part] = slope @ k[g]
            dk[g] += (slope.mT @ q[part]).sum(0)
    kept = (out, dq, dk, dv) if setup.train else (out,)
    save_file({str(k): x[None].cpu().contiguous() for k, x in enumerate(kept)}, path)


def baseline(setup: Setup, pairs: list[Pair]) -> tuple[float, str, float] | None:
    """Time the fastest kernel for separate sequences. Returns milliseconds, its name and its pairs of tokens."""
    names = ["paired, FA4 varlen", "paired, FA2 varlen"] if setup.train else ["paired, flex"]
    if len({pair[0] + n for pair in pairs for n in pair[1:]}) == 1 and setup.train:
        names += ["paired, SDPA cuDNN", "paired, SDPA flash", "paired, FA4"]
    if time.monotonic() > setup.deadline:
        return None
    row: Row = make_row(setup, pairs, False)
    times = {name: attempt(setup, name, partial(attention_ms, setup, row, name, PAIRED[name])) for name in names}
    known = {name: ms for name, ms in times.items() if ms is not None}
    if not known:
        return None
    best = min(known, key=lambda name: known[name])
    return known[best], best, float(sum((p + n) * (p + n + 1) / 2 for p, *rest in pairs for n in rest))


def visible_of(pairs: Iterable[Pair]) -> float:
    """Count pairs of tokens of which one sees the other in a shared row."""
    return float(sum((p * (p + 1)) / 2 + sum(n * p + n * (n + 1) / 2 for n in rest) for p, *rest in pairs))


def cases_of(size: int, lengths: dict[str, Any], options: argparse.Namespace) -> dict[str, list[Pair]]:
    """Make the pairs of each row of ``size`` tokens: on the longest rows of one document alone."""
    document: dict[str, list[Pair]] = {DOCUMENT: [(size - 2 * (size // 8), size // 8, size // 8)]}
    if size > options.rows[0]:
        return document
    found: dict[str, list[Pair]] = {}
    for name in options.sets:
        found[name] = [(len(p), len(c), len(r)) for p, c, r in draw_pairs(lengths[name], size, 1000)]
    for name, pair in UNIFORM.items():
        if sum(pair) <= size:
            found[name] = [pair] * (size // sum(pair))
    return found | document


def measure(workers: Workers, size: int, heads: int, found: list[Trial], lengths: Any, options: Any) -> dict[str, Any]:
    """Compile and time trials on the rows of one size. Returns a record."""
    print(f"\nheads of {heads}, rows of {size:,} tokens: compiling {len(found)} trials", flush=True)
    cases = cases_of(size, lengths, options)
    setup = setup_of(options, heads)
    record: dict[str, Any] = dict(size=size, heads=heads, cases={}, times={}, errors={}, failed={})
    workers.all(len(found), "rows", heads, cases)

    last = workers.channels[-1]
    alone = len(workers.channels) == 1
    if not alone:
        last.send(("separate", heads, cases))
    record["failed"] = workers.compile(found, options.deadline)
    if alone:
        last.send(("separate", heads, cases))
    status, best = last.recv()
    for name, pairs in cases.items():
        separate = best[name] if status == "done" else None
        record["cases"][name] = dict(pairs=len(pairs), visible=visible_of(pairs), separate=separate)
        print(f"  {name}: {len(pairs)} pairs; separate sequences: {separate or best}", flush=True)
    usable = [trial for trial in found if trial.name not in record["failed"]]
    checked = next(iter(cases))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.pt"
        if size == options.rows[0]:
            truth_of(setup, cases[checked], bucket(size), path)
        for trial in usable:
            if time.monotonic() > options.deadline:
                break
            if path.exists():
                done, errors = workers.ask("error", trial, checked, str(path))
                if not done:
                    record["failed"][trial.name] = errors
                    print(f"  {trial.name}: {errors}", flush=True)
                    continue
                record["errors"][trial.name] = errors
            done, times = workers.ask("time", trial)
            record["times" if done else "failed"][trial.name] = times
            print(f"  {trial.name}: {brief(times) if done else times}", flush=True)
    return record


def brief(times: dict[str, list[float | None]]) -> str:
    return "; ".join(f"{name} {' + '.join('-' if ms is None else f'{ms:.2f}' for ms in both)}"
                     for name, both in times.items())  # fmt: skip


def ratio_of_error(record: dict[str, Any], name: str) -> float | None:
    """Return the largest ratio of a trial's errors to those of torch's own options."""
    own, errors = record["errors"].get(OWN), record["errors"].get(name)
    if not own or not errors:
        return None
    ratios = [x / y if y else float(x > 0) for x, y in zip(errors, own, strict=True)]
    return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


def right(record: dict[str, Any], name: str, options: argparse.Namespace) -> bool:
    ratio = ratio_of_error(record, name)
    return ratio is None or ratio <= options.worse


def finalists(record: dict[str, Any], found: list[Trial], options: argparse.Namespace) -> list[Trial]:
    """Choose the trials of longer rows: the fastest forwards with the fastest backwards, on one document."""
    known = {t.name: t for t in found if t.name in record["times"] and right(record, t.name, options)}
    triton = [t for t in known.values() if t.name != FA4 and t.blocks == LARGE]
    chosen = [known[name] for name in (OWN, FA4) if name in known]
    orders = []
    for which in (0, 1):
        by_time = [t for t in triton if record["times"][t.name][DOCUMENT][which] is not None]
        orders.append(sorted(by_time, key=lambda t: record["times"][t.name][DOCUMENT][which]))
    for forward, backward in zip(*orders, strict=False):
        both = {"USE_TMA"} & (forward.options.keys() ^ backward.options.keys())
        if len(chosen) >= 2 + options.finalists:
            break
        mixed = {name: value for name, value in forward.options.items() if name.startswith("fwd_")}
        mixed |= {name: value for name, value in backward.options.items() if name.startswith("bwd_")}
        for prefix, trial in (("fwd_", forward), ("bwd_", backward)):
            shared = {k: v for k, v in trial.options.items() if not k.startswith(("fwd_", "bwd_"))}
            mixed |= {k if not both else f"{prefix}{k}": v for k, v in shared.items()}
        name = forward.name if forward is backward else f"[{forward.name}] with backward of [{backward.name}]"
        if name != OWN:
            chosen.append(Trial(name, options=mixed))
    return chosen


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--heads", type=int, nargs="+", default=[128, SMALL_HEADS], help="head sizes (%(default)s)")
    add("--rows", type=int, nargs="+", default=[16384, 65536, 131072], help="tokens of a row, ascending (%(default)s)")
    add("--sets", nargs="*", default=["gsm8k_4shot", "hh", "capybara"])
    add("--trials", nargs="+", help="only trials whose names begin so; torch's own always run")
    add("--finalists", type=int, default=3, help="pairs of options on longer rows (%(default)s)")
    add("--worse", type=float, default=1.5, help="error that a trial may have, over torch's own (%(default)s)")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that compile (%(default)s)")
    add("--seconds", type=float, default=240, help="begin nothing after so many seconds (%(default)s)")
    add("--rest", type=float, default=1.4, help="seconds; results/whole_models.md has such steps (%(default)s)")
    add("--render", type=Path, metavar="JSON", help="measure nothing: print the table of an earlier run")
    add("--output", type=Path, default=Path("runs/kernel_options"))
    options = parser.parse_args()
    if options.device == "cpu":
        vars(options).update(dtype="float32", heads=options.heads[-1:], rows=[1024, 2048], workers=2)
        vars(options).update(trials=options.trials or ["blocks", "64 64"], sets=options.sets[:1])
    options.deadline = time.monotonic() + options.seconds
    options.brief = True
    return options


def main() -> int:
    options = read_options()
    lengths = json.loads(options.lengths.read_text())
    if options.render:
        print(page(json.loads(options.render.read_text()), lengths, options))
        return 0
    prepare(options)
    options.output.mkdir(parents=True, exist_ok=True)
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, forward alone, few heads"
    about = ", ".join(f"{k} {versions.get(k)}" for k in ("torch", "triton", "flash-attn-4"))
    results: dict[str, Any] = {"about": f"{name}, {about}, {options.dtype}", "records": []}
    print(results["about"], flush=True)
    workers = Workers(options)
    found = {heads: wanted(trials(heads), options) for heads in options.heads}
    try:
        for size in options.rows:
            for heads in options.heads:
                if time.monotonic() > options.deadline or not found[heads]:
                    print(f"heads of {heads}, rows of {size:,}: left out", flush=True)
                    continue
                record = measure(workers, size, heads, found[heads], lengths, options)
                results["records"].append(record)
                (options.output / "kernel_options.json").write_text(json.dumps(results, indent=1))
                (options.output / "table.md").write_text(page(results, lengths, options) + "\n")
                print("\n" + table(record, cases_of(size, lengths, options), options), flush=True)
                if size == options.rows[0]:
                    found[heads] = finalists(record, found[heads], options)
    finally:
        workers.close()
    return int(any(OWN in record["failed"] for record in results["records"]))


def wanted(found: list[Trial], options: argparse.Namespace) -> list[Trial]:
    chosen = options.trials
    return [t for t in found if not chosen or t.name == OWN or any(t.name.startswith(word) for word in chosen)]


def page(results: dict[str, Any], lengths: Any, options: argparse.Namespace) -> str:
    """Show all records, with their conditions and the command that measured them."""
    records = results["records"]
    sizes, heads = (list(dict.fromkeys(record[name] for record in records)) for name in ("size", "heads"))
    options = argparse.Namespace(**{**vars(options), "rows": sizes})
    parts = []
    for record in records:
        cases = cases_of(record["size"], lengths, options)
        parts += [f"**Heads of {record['heads']}, rows of {record['size']:,} tokens**", table(record, cases, options)]
    asked = f"--heads {' '.join(map(str, heads))} --rows {' '.join(map(str, sizes))}"
    conditions = [
        "Forward + backward of attention alone in ms (share of the ideal; saved of a 7B model's step), Mistral-7B's 32",
        "heads, 8 of keys, random numbers. *Ideal*: the fastest kernel for separate sequences, by the ratio of visible",
        "pairs of tokens. *Saved*: in 32 layers, forward twice, since a reference runs too, of a step of",
        f"{options.rest:g} s for 16,384 tokens, plus attention by torch's own options. *Error*: the largest of output",
        "and gradients, against a float32 softmax, over that of torch's own options. Options are named by BLOCK_M,",
        "BLOCK_N, warps and stages of forward / BLOCK_M1, N1, M2, N2, warps and stages of backward.",
        f"{results['about']}. `python benchmarks/kernel_options.py {asked}`",
    ]
    parts.append(" ".join(conditions))
    return "\n\n".join(parts)


def table(record: dict[str, Any], cases: dict[str, list[Pair]], options: argparse.Namespace) -> str:
    """Show forward + backward of torch's own options, of FA4 and of what is right and faster somewhere."""
    names = list(record["cases"])
    tokens = {name: sum(map(sum, cases[name])) for name in names}
    for name, case in record["cases"].items():
        if case["visible"] != visible_of(cases[name]):
            raise SystemExit(f"{name}: measured with other lengths")
    ideal: dict[str, float] = {}
    for name, case in record["cases"].items():
        if case["separate"]:
            ms, _, pairs = case["separate"]
            ideal[name] = ms * case["visible"] / pairs

    times = record["times"]
    failed = [f"Failed: {name}: {reason}" for name, reason in record["failed"].items()]
    if OWN not in times:
        return "\n".join(failed)
    sound = [trial for trial in times if right(record, trial, options)]
    tiled = [trial for trial in sound if trial not in (OWN, FA4) and not trial.startswith("blocks")]
    best = {name: [fastest(times[trial][name][i] for trial in (OWN, *tiled)) for i in (0, 1)] for name in names}
    faster = [
        trial
        for trial in sound
        if trial not in (OWN, FA4, *tiled) and any(total(times[trial][n]) < total(times[OWN][n]) for n in names)
    ]

    def row(label: str, found: dict[str, list[float | None]], error: float | None) -> str:
        cells = []
        for name in names:
            notes = [f"{ideal[name] / total(found[name]):.2f}"] if name in ideal else []
            spared = saved(found[name], times[OWN][name], tokens[name], options)
            if label != OWN and spared is not None:
                notes.append(f"{spared:.1%}")
            ms = " + ".join(f"{x:.2f}" for x in found[name] if x is not None)
            cells.append(f"{ms} ({'; '.join(notes)})" if notes else ms)
        return line(label, None if error is None else f"{error:.2f}", *cells)

    lines = [line("options", "error", *names), "|---" * (2 + len(names)) + "|"]
    lines.append(line("*visible keys a token*", None, *(f"{visible_of(cases[n]) / tokens[n]:,.0f}" for n in names)))
    lines.append(line("*ideal*", None, *(f"{ideal[n]:.2f}" if n in ideal else None for n in names)))
    lines.append(row(OWN, times[OWN], ratio_of_error(record, OWN)))
    if tiled:
        lines.append(row(f"best of {1 + len(tiled)} tiles and loads", best, None))
    lines += [row(trial, times[trial], ratio_of_error(record, trial)) for trial in (*faster, FA4) if trial in sound]
    lines.append("")
    if tiled:
        lines.append(
            "*Best*: for each row the fastest forward and the fastest backward, apart, of torch's own options and of "
            f"{listed(tiled)}."
        )
    slower = [trial for trial in sound if trial not in (OWN, FA4, *tiled, *faster)]
    if slower:
        lines.append(f"Right, and no faster on any row: {listed(slower)}.")
    wrong = [f"{trial} ({ratio_of_error(record, trial):,.2f})" for trial in times if trial not in sound]
    if wrong:
        lines.append(f"Wrong (error): {listed(wrong)}.")
    return "\n".join([*lines, *failed]).rstrip()


def listed(names: Iterable[str]) -> str:
    return "; ".join(name.replace("; ", " / ") for name in names)


def total(times: list[float | None]) -> float:
    return sum(ms for ms in times if ms is not None)


def fastest(times: Iterable[float | None]) -> float | None:
    return min((ms for ms in times if ms is not None), default=None)


def saved(times: list[float | None], own: list[float | None], tokens: int, options: argparse.Namespace) -> float | None:
    """Return the share of a 7B model's step on so many tokens that a trial saves; None without a backward."""
    if times[1] is None or own[1] is None:
        return None
    mine, torchs = (LAYERS * (2 * (forward or 0.0) + (backward or 0.0)) for forward, backward in (times, own))
    return (torchs - mine) / (options.rest * 1000 * tokens / 16384 + torchs)


if __name__ == "__main__":
    sys.exit(main())
