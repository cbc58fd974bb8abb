"""Shared memory that FlexAttention's kernels need on each card, without the cards.

    python benchmarks/cards.py            # writes benchmarks/results/cards.md and docs/cards.md; needs Triton, no GPU
    python benchmarks/cards.py --docs     # docs/cards.md alone, from the results
    python benchmarks/cards.py --check    # runs the tiles of all cards on this machine's GPU, against a float64 softmax

A GPU kernel that needs more shared memory than a thread block may take fails at its first call. Triton knows the need
of a kernel once it has lowered it, and it can lower for any card. Inductor renders flexpatch's attention (rows' block
mask, grouped heads, with and without a window and a soft cap) as on that card, forward and backward, with its own tiles
and with the tiles of ``flexpatch.devices``. The table shows what Triton reports of each kernel. ``--assemble`` also
runs ptxas, which shows that a kernel's machine code can be made for that card.
"""

import argparse
import ast
import copy
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from flexpatch import attention, devices
from flexpatch.masks import block_mask, dense_mask
from flexpatch.rows import build_rows
from flexpatch.tree import Tree

RESULTS = Path(__file__).resolve().parent / "results" / "cards.md"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "cards.md"
CARDS = {
    (8, 0): "A100",
    (8, 6): "RTX 3090, A10G, A40",
    (8, 9): "RTX 4090, L4, L40S",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (12, 0): "RTX 5090",
}
HEADS = ("64", "80", "96", "128", "160", "192", "192/128", "256", "512")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
PASSES = ("forward", "backward")
LENGTH = 512
CUDA = torch.device("cuda", 0)
FLEX = (torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward)


@dataclass(frozen=True)
class Kernel:
    """Source of a kernel, as Inductor rendered it."""

    name: str
    text: str

    def arguments(self) -> tuple[dict[str, str], dict[Any, Any]]:
        """Types of the kernel's arguments, and their alignment."""
        signature = re.search(r"'signature': (\{.*?\})", self.text)
        known = re.search(r"'configs': \[(\{.*?\})\]", self.text)
        assert signature and known
        return ast.literal_eval(signature[1]), ast.literal_eval(known[1])

    def function(self, tiles: dict[str, int], folder: Path) -> Any:
        """Make the Triton function with other tiles, which are constants in its text."""
        text = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", self.text, flags=re.DOTALL)
        for name, value in tiles.items():
            text, count = re.subn(rf"(\b{name} : tl\.constexpr = ).*", rf"\g<1>{value}", text)
            assert count, f"{self.name} has no {name}"
        path = folder / "kernel.py"  # Triton reads its source from a file
        path.write_text(text.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, self.name)


def render(size: int, value_size: int, dtype: torch.dtype, windowed: bool) -> dict[str, Kernel]:
    """Render the kernels of flexpatch's attention, by pass, as Inductor writes them for a GPU.

    Attention is traced on the CPU, where autograd needs no driver. Inductor then gets graphs with tensors on a GPU.
    """
    from torch._inductor.compile_fx import compile_fx, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    kernels: dict[str, Kernel] = {}

    def lower(graph: Any, inputs: Any, **options: Any) -> Any:
        mode = torch._guards.detect_fake_mode(inputs)
        with on_a_gpu():
            moved = to_cuda(copy.deepcopy(graph), mode)
            record_original_output_strides(moved)
            examples = [as_cuda(x, mode) for x in inputs]
            backward = options.get("is_backward", False)
            lowering = GraphLowering(moved, example_inputs=examples, is_backward=backward)
            with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering), V.set_fake_mode(mode):
                lowering.run(*examples)
                code: Any = lowering.codegen()[0]
        found = re.search(r"async_compile\.triton\('(triton_tem\w+)', '''(.*?)''', device_str", code.value, re.DOTALL)
        assert found, "Inductor wrote no template kernel"
        kernels[PASSES[backward]] = Kernel(found[1], found[2])
        return lambda *arguments: empty_results(graph)

    ends = torch.full((1, LENGTH), LENGTH, dtype=torch.int32)
    mask = block_mask(ends, torch.arange(LENGTH, dtype=torch.int32)[None], 100 if windowed else None)
    shapes = ((8, size), (2, size), (2, value_size))
    q, k, v = (torch.zeros(1, heads, LENGTH, d, dtype=dtype, requires_grad=True) for heads, d in shapes)
    torch._dynamo.reset()

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=lower)

    with mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None):
        attend = torch.compile(attention._attend, backend=backend, fullgraph=True, dynamic=False)
        attend(q, k, v, mask, None, 30.0 if windowed else None, None, {}).sum().backward()
    return kernels


def empty_results(graph: Any) -> list[Any]:
    """Return empty results of a traced graph. Only the sources of kernels are of interest."""
    nodes = graph.graph.output_node().args[0]
    values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in nodes]
    return [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in values]


def as_cuda(value: Any, mode: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def to_cuda(graph: Any, mode: Any) -> Any:
    """Move the tensors of a traced graph to a GPU, and keep the log-sum-exp, which backward on a GPU needs."""
    from torch.utils._pytree import tree_map

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": CUDA}
        if node.target in FLEX:
            node.args = tuple(a | {"OUTPUT_LOGSUMEXP": True} if isinstance(a, dict) else a for a in node.args)
        if "val" in node.meta:
            node.meta["val"] = tree_map(lambda value: as_cuda(value, mode), node.meta["val"])
    for child in graph.children():
        if isinstance(child, torch.fx.GraphModule):
            to_cuda(child, mode)
    graph.recompile()
    return graph


@contextmanager
def on_a_gpu(capability: tuple[int, int] = (8, 0)) -> Iterator[None]:
    """Make Inductor and Triton believe in a card. The card decides only the tiles, which are replaced afterwards."""
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    card = DeviceProperties("cuda", 0, 80, capability[0] * 10 + capability[1], capability[0], 65536, 2048, 1024, 32)
    target = GPUTarget("cuda", card.cc, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_active_torch_device=lambda: CUDA
        )
    )
    with ExitStack() as stack:
        for owner, name, value in (
            (DeviceProperties, "create", lambda device: card),
            (torch._subclasses.fake_tensor, "init_gpu_context", lambda *device: None),
            (torch._inductor.scheduler, "has_triton", lambda *device: True),
            (torch.cuda, "get_device_capability", lambda *device: capability),
            (torch.cuda, "get_device_properties", lambda *device: SimpleNamespace(**card._asdict())),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "is_available", lambda: True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def torch_tiles(which: str, size: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Look up the tiles that Inductor chooses on a card."""
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    with on_a_gpu(capability):
        heuristic = CUDAConfigHeuristic()
        if which == "forward":
            (c,) = heuristic.get_flex_attn_fwd_configs(size, dtype)
            tiles = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n}
        else:
            (c,) = heuristic.get_flex_attn_bwd_configs(size, dtype)
            tiles = {name: getattr(c, name.lower()) for name in ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}
    return tiles | {"num_stages": c.num_stages, "num_warps": c.num_warps}


def our_tiles(tiles: dict[str, int], options: dict[str, int], which: str) -> dict[str, int]:
    """Change torch's tiles by kernel options, as Inductor does."""
    prefix = {"forward": "fwd_", "backward": "bwd_"}[which]
    return tiles | {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}


def shared_bytes(kernel: Kernel, tiles: dict[str, int], capability: tuple[int, int], assemble: bool = False) -> int:
    """Read the shared memory of one thread block from a lowered kernel. ``assemble`` makes machine code too."""
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    blocks = {name: value for name, value in tiles.items() if name.startswith("BLOCK_")}
    launch = {name: value for name, value in tiles.items() if name.startswith("num_")}
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    signature, known = kernel.arguments()
    with tempfile.TemporaryDirectory() as folder:
        source = ASTSource(kernel.function(blocks, Path(folder)), signature, {}, known)
        if assemble:
            return triton.compile(source, target=target, options=launch).metadata.shared
        backend = make_backend(target)
        options = backend.parse_options(launch)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        helpers = backend.get_codegen_implementation(options), backend.get_module_map()
        module = source.make_ir(target, options, *helpers, context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        metadata: dict[str, Any] = {"target": target, **options.__dict__}
        for stage in ("ttir", "ttgir", "llir"):
            module = stages[stage](module, metadata)
    return metadata["shared"]


def sizes_of(head: str) -> tuple[int, int]:
    """Parse head sizes: ``192/128`` is 192 for queries and keys, and 128 for values."""
    size, _, values = head.partition("/")
    return int(size), int(values or size)


class Line(NamedTuple):
    """Need of one kernel on one card."""

    head: str
    dtype: str
    which: str
    card: str
    tiles_of: str
    tiles: str
    kb: str

    @property
    def capability(self) -> tuple[int, int]:
        major, _, minor = self.card.partition(".")
        return int(major), int(minor)


def measure(head: str, dtype: str, assemble: bool) -> Iterator[Line]:
    """Measure the lines of one kind of head."""
    sizes = sizes_of(head)
    kernels = render(*sizes, DTYPES[dtype], True)
    known: dict[Any, int] = {}
    for which in PASSES:
        for capability in CARDS:
            stock = torch_tiles(which, sizes[0], DTYPES[dtype], capability)
            options = devices.fitting(devices.SHARED_KB[capability], sizes, DTYPES[dtype])
            for whose, tiles in (("torch", stock), ("flexpatch", our_tiles(stock, options or {}, which))):
                if whose == "flexpatch" and tiles == stock:
                    continue
                # Kernels for Ampere and Ada are lowered alike.
                target = (8, 6) if capability[0] == 8 else capability
                key = which, target, tuple(tiles.items())
                if key not in known:
                    known[key] = shared_bytes(kernels[which], tiles, target, assemble)
                name = " ".join(f"{tile.removeprefix('num_')}={value}" for tile, value in tiles.items())
                card = ".".join(map(str, capability))
                yield Line(head, dtype, which, card, whose, name, f"{known[key] / devices.KB:.1f}")


def read(path: Path = RESULTS) -> list[Line]:
    """Read the lines that :func:`main` wrote."""
    rows = [line.strip("| \n").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return [Line(*row) for row in rows[1:]]


def write(path: Path, version: str, lines: list[Line]) -> None:
    """Add lines to those that the same release has measured of other heads and dtypes."""
    if path.exists() and path.read_text().startswith(f"{version}\n"):
        lines = [line for line in read(path) if line[:2] != lines[0][:2]] + lines
    lines = sorted(lines, key=lambda line: (line.dtype, sizes_of(line.head)))
    header = f"| {' | '.join(Line._fields).replace('_', ' ')} |\n{'|---' * len(Line._fields)}|\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{version}\n\n{header}" + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def docs(lines: list[Line], version: str) -> str:
    """Write the text of docs/cards.md."""
    text = INTRODUCTION
    for dtype, title in (("bfloat16", "bfloat16 and float16"), ("float32", "float32")):
        heads = dict.fromkeys(line.head for line in lines if line.dtype == dtype)
        text += f"\n## {title}\n\n| head | {' | '.join(CARDS.values())} |\n|---|{'---|' * len(CARDS)}\n"
        text += f"| *shared memory* | {' | '.join(f'*{devices.SHARED_KB[c]} KB*' for c in CARDS)} |\n"
        for head in sorted(heads, key=sizes_of):
            cells = [cell([x for x in lines if x[:2] == (head, dtype) and x.capability == card]) for card in CARDS]
            text += f"| {head} | {' | '.join(cells)} |\n"
    return text + f"\nMeasured with {version}.\n"


def cell(lines: list[Line]) -> str:
    """Name the kernels that run for one head on one card, and the KB that the larger one needs."""
    torch_kb = max(float(line.kb) for line in lines if line.tiles_of == "torch")
    capability, sizes, dtype = lines[0].capability, sizes_of(lines[0].head), DTYPES[lines[0].dtype]
    options = devices.fitting(devices.SHARED_KB[capability], sizes, dtype)
    if options is None:
        return f"dense (flex: {torch_kb:.0f})"
    ours = max(float(line.kb) for line in used(lines))
    changed = any(line.tiles_of == "flexpatch" for line in lines)
    return f"flex, smaller tiles, {ours:.0f} (torch's: {torch_kb:.0f})" if changed else f"flex, {ours:.0f}"


def used(lines: list[Line]) -> list[Line]:
    """Keep the lines of the tiles that flexpatch chooses, of all lines of one head on one card."""
    ours = {line.which: line for line in sorted(lines, key=lambda line: line.tiles_of == "flexpatch")}
    return list(ours.values())


def check(head: str, dtype: torch.dtype, options: dict[str, int]) -> bool:
    """Check kernels with these options on this machine's GPU, forward and backward.

    The truth is a float64 softmax. The bound is twice the error of a dense softmax in the same precision. The negative
    control, rows whose answers see each other, must be far beyond the bound.
    """
    rows = build_rows([[Tree.of([1] * 300, [2] * 90, [3] * 41), Tree.of([1] * 7, [2] * 60, [3] * 200)]]).to(CUDA)
    length = rows.input_ids.shape[1]
    size, value_size = sizes_of(head)
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = ((8, size), (2, size), (2, value_size))
    qkv = [
        torch.randn(1, heads, length, d, device=CUDA, dtype=dtype, generator=generator).requires_grad_()
        for heads, d in shapes
    ]
    weight = torch.randn(1, length, 8, value_size, device=CUDA, generator=generator)

    def dense(wide: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(wide) for x in qkv)
        k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        seen = dense_mask(rows.ends, rows.position_ids, None)
        scores = (q @ k.mT * size**-0.5).masked_fill(~seen, -torch.inf)
        return results((scores.softmax(-1) @ v).transpose(1, 2))

    def results(out: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), qkv)
        return [x.detach().double() for x in (out, *gradients)]

    def ours(ends: Tensor) -> list[Tensor]:
        return results(attention.flex(*qkv, block_mask(ends, rows.position_ids, None)))

    truth = dense(torch.float64)

    def errors(found: list[Tensor]) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]

    stock = errors(dense(dtype))
    with mock.patch.object(attention, "tiles", lambda *call: tuple(options.items())):
        right, wrong = errors(ours(rows.ends)), errors(ours(torch.full_like(rows.ends, length)))
    exact = all(x <= 2 * y for x, y in zip(right, stock, strict=True))
    caught = min(wrong) > 10 * max(stock)
    shown = "; ".join(f"{x:.1e} ({y:.1e}, {z:.1e})" for x, y, z in zip(right, stock, wrong, strict=True))
    print(f"{'right' if exact and caught else 'WRONG'}: {head} {dtype} {options}: {shown}", flush=True)
    return exact and caught


def check_all() -> bool:
    """Run all options of ``devices.TILES`` on heads that they are for."""
    print("output, gradients of q, k, v: error (of a dense softmax, of answers that see each other)")
    cases = {
        (head, name, tuple(options.items()))
        for tiles_kb in devices.TILES
        for name in ("bfloat16", "float32")
        for head in ("96", "160", "192/128", "256", "512")
        if (options := devices.fitting(tiles_kb, sizes_of(head), DTYPES[name]))
    }
    failed = [case for case in sorted(cases) if not check(case[0], DTYPES[case[1]], dict(case[2]))]
    return not failed


INTRODUCTION = """# Cards

For whoever wants to know what a GPU runs: the choice of `backend="auto"` by card and head size, and the shared memory
in KB that one block of its larger kernel, forward or backward, needs.

*flex*: with torch's own tiles, or with smaller ones where those would die at the first call (torch's need in brackets).
*dense*: exact as well, but attention computes all L x L scores of a row; `apply` warns of it, and `backend="flex"` is
refused. Kernels round heads up to a power of two, and tiles are chosen by that size: a head that is not
listed gets the tiles of a listed one that rounds alike, but was not measured.

Elsewhere: before Ampere (V100, T4), without Triton (Windows without triton-windows), in float64 (for which Triton does
not compile torch's kernels), and for heads under 16 or over 512, `auto` is dense. On AMD GPUs nobody has run it:
`auto` is dense, `backend="flex"` warns. Intel GPUs: flex.

None of these cards but the H100 was at hand: kernels are lowered for them by Triton, which tells what they need, with a
window and a soft cap (which take half a KB more); no speed was measured elsewhere. `python benchmarks/cards.py`
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads",
        nargs="+",
        default=list(HEADS),
        help="sizes of heads; 192/128: 192 for queries and keys, 128 for values",
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--assemble", action="store_true", help="run ptxas as well")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="write docs/cards.md from the results, without measuring")
    parser.add_argument("--check", action="store_true", help="run all of flexpatch's tiles on this machine's GPU")
    options = parser.parse_args()
    if options.check:
        sys.exit(0 if check_all() else 1)
    if not options.docs:
        import triton

        version = f"torch {torch.__version__}, triton {triton.__version__}"
        for head in options.heads:
            for dtype in options.dtypes:
                lines = []
                for line in measure(head, dtype, options.assemble):
                    lines.append(line)
                    print(f"| {' | '.join(line)} |", flush=True)
                write(options.output, version, lines)
    if options.output == RESULTS:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(docs(read(), RESULTS.read_text().splitlines()[0]))


if __name__ == "__main__":
    main()
