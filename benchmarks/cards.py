"""Shared memory that FlexAttention's kernels need on each card, without the cards.

    python benchmarks/cards.py                       # writes benchmarks/results/cards.md; needs Triton, no GPU
    python benchmarks/cards.py --heads 128 --assemble

A GPU kernel that needs more shared memory than a thread block may take dies at its first call. How much it needs is
known once Triton has lowered it, and Triton lowers for any card: Inductor renders our attention (rows' block mask,
grouped heads, with a window and a soft cap, and without) as on that card, forward and backward, with its own tiles and
with those of ``flexpatch.devices``, and what Triton tells of each kernel fills the table. ``--assemble`` also runs
ptxas, which shows that a kernel's machine code can be made for that card.
"""

import copy
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map

from flexpatch import attention
from flexpatch.masks import block_mask

RESULTS = Path(__file__).resolve().parent / "results" / "cards.md"
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
HEADS = ("16", "32", "64", "80", "96", "128", "160", "192", "192/128", "256", "512")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
PASSES = ("forward", "backward")
LENGTH = 512
CUDA = torch.device("cuda", 0)
FLEX = (torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward)


@dataclass(frozen=True)
class Kernel:
    """Source of a kernel as Inductor rendered it."""

    name: str
    text: str

    def arguments(self) -> tuple[dict[str, str], dict[Any, Any]]:
        """Their types, and what is known of their alignment."""
        signature = re.search(r"'signature': (\{.*?\})", self.text)
        known = re.search(r"'configs': \[(\{.*?\})\]", self.text)
        assert signature and known
        return eval(signature[1]), eval(known[1])

    def function(self, tiles: dict[str, int], folder: Path) -> Any:
        """The Triton function, with other tiles: they are constants in its text."""
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
    """Our attention's kernels, by pass, as Inductor writes them for a GPU.

    It is traced on the CPU, where autograd needs no driver; Inductor then gets graphs whose tensors are on a GPU.
    """
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
        attend(q, k, v, mask, None, 30.0 if windowed else None, None, False).sum().backward()
    return kernels


def empty_results(graph: Any) -> list[Any]:
    """What a traced graph would return, uncomputed: only kernels' sources are of interest."""
    nodes = graph.graph.output_node().args[0]
    values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in nodes]
    return [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in values]


def as_cuda(value: Any, mode: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def to_cuda(graph: Any, mode: Any) -> Any:
    """A traced graph whose tensors are on a GPU, and which keeps the log-sum-exp as backward on a GPU needs it."""
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
    """Inductor and Triton believe in a card. Which one matters for tiles alone, and those are set afterwards."""
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
    """The tiles that Inductor takes by itself on a card."""
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


def with_options(tiles: dict[str, int], options: dict[str, int], which: str) -> dict[str, int]:
    """Tiles as Inductor changes them for kernel options."""
    prefix = which[0] + {"forward": "wd_", "backward": "wd_"}[which]
    return tiles | {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}


def shared_bytes(kernel: Kernel, tiles: dict[str, int], capability: tuple[int, int], assemble: bool = False) -> int:
    """Shared memory of one thread block. ``assemble``: make machine code too."""
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
