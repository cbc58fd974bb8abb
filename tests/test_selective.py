"""Layers that keep their products alone: the gradients of the unpatched model, fewer bytes, no product twice."""

import gc
import warnings
from functools import partial
from typing import Any

import peft
import pytest
import torch
from helpers.oracle import MODELS, Result, deep, few, name, oracle, random_ids, separate
from parameterized import parameterized
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_debug_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

import flexpatch
from flexpatch import Tree, selective
from flexpatch.checkpointing import KEPT, Recomputation
from flexpatch.internals import layers_of
from flexpatch.keeping import Choice, choose, mixture
from flexpatch.meters import Memory
from flexpatch.models import tiny_model
from flexpatch.selective import attention_contexts, can_keep_products, contexts, way_of

TERMS = 16  # of a tiny model's products, at least
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
NOT_REENTRANT = {"use_reentrant": False}


@pytest.fixture(autouse=True)
def products_of_few_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective, "INNER", TERMS)


def partly(model: nn.Module, **options: Any) -> nn.Module:
    model.train().gradient_checkpointing_enable(NOT_REENTRANT)
    return flexpatch.apply(model, recompute_layers="partly", **options)


THREE, SOME, LITTLE, NONE = [10, 10, 10], [4, 4, 4], [1, 1, 1], [0, 0]


@parameterized.expand(
    [
        (THREE, SOME, -1, (0, 0)), (THREE, SOME, 3, (0, 0)), (THREE, SOME, 4, (0, 1)), (THREE, SOME, 11, (0, 2)),
        (THREE, SOME, 12, (0, 3)), (THREE, SOME, 17, (0, 3)), (THREE, SOME, 18, (1, 3)), (THREE, SOME, 24, (2, 3)),
        (THREE, SOME, 30, (3, 3)), ([5, 5], NONE, -1, (0, 0)), ([5, 5], NONE, 5, (1, 2)), ([4, 4], [5, 5], 10, (2, 2)),
        # The last layer cannot keep products alone.
        ([10, 3], [4, 0], 3, (0, 1)), ([10, 3], [4, 0], 7, (1, 2)), ([10, 3], [4, 0], 13, (2, 2)),
    ]
)  # fmt: skip
def test_mixtures(kept: list[float], products: list[float], room: float, expected: tuple[int, int]) -> None:
    nothing = [0.0] * len(kept)
    attention, *others = mixture([nothing, products, kept], room)
    assert tuple(reversed(others)) == expected
    assert attention == (len(kept) if room >= 0 else 0)


@parameterized.expand(
    [
        (-1, [0, 0, 0]), (0, [0, 0, 0]), (2, [2, 0, 0]), (3, [3, 0, 0]), (5, [3, 0, 0]), (6, [3, 1, 0]), (9, [3, 2, 0]),
        (12, [3, 3, 0]), (18, [3, 3, 1]), (30, [3, 3, 3]),
    ]
)  # fmt: skip
def test_mixtures_with_attention(room: float, expected: list[int]) -> None:
    """All keep attention before one keeps products, of which it is a part."""
    assert mixture([LITTLE, SOME, THREE], room) == expected


def test_a_mixture_s_layers() -> None:
    layers = [nn.Identity() for _ in range(4)]
    usable = dict(attention=[1, 2, 3], products=[0, 1, 2], everything=range(4))
    assert choose(layers, usable, [4, 2, 0]) == Choice([], [layers[2]], [layers[1], layers[3]])
    assert choose(layers, usable, [4, 4, 1]) == Choice([layers[3]], layers[:3], [])


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("options", [dict(), dict(backend="flex"), dict(backend="flex", compile=True)])
def test_parity(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, rows = partly(tiny_model("llama"), **options), flexpatch.build_rows([few()])
    true = oracle("llama", 0, samples=few)
    for _ in range(2):  # the first call finds out whether products may be kept
        Result.packed(model, rows).matches(true)
    if not options:  # compiled functions run uncompiled under the mode of this control
        monkeypatch.setattr(selective, "create_selective_checkpoint_contexts", wrong_contexts)
        assert Result.packed(model, rows).errors(true)[1] > 1e-6, "kept products were changed"


# Layers that write over their products, with torch's in-place operations.
WRITING = {"olmo"}
# In float64 they do not train unpatched either.
SINGLE = {"inkling2_text", "inkling2_loop_text", "inkling2", "inkling2_loop", "xglm"}


@parameterized.expand(MODELS, name_func=name)
@pytest.mark.slow
def test_parity_of_all(model_type: str, variant: int) -> None:
    """With what the same rows give where everything is kept, which other tests hold to the unpatched model."""
    model = tiny_model(model_type, variant, dtype=torch.float32 if model_type in SINGLE else torch.float64)
    if not (layers_of(flexpatch.patch.backbone_of(model)) and model.supports_gradient_checkpointing):
        pytest.skip("no checkpointing of layers")
    rows = flexpatch.build_rows([[Tree.of(*random_ids(30, 12, 9)), Tree.of(*random_ids(8, 5, 14, seed=1))]])
    model.train().gradient_checkpointing_enable(NOT_REENTRANT)
    true = Result.packed(flexpatch.apply(model, recompute_layers=0), rows)
    partly(model)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", flexpatch.FlexpatchWarning)
            Result.packed(model, rows).matches(true, (1e-13, 1e-13))
    stage = flexpatch.forward.hook_of(model).recomputation
    assert all(stage.survives.values()) == (model_type not in WRITING), stage.survives
    whole = any("whole layers" in str(warning.message) for warning in caught)
    assert whole == (not stage.survives or model_type in WRITING)


class Wrong(TorchDispatchMode):
    """Changes each product by a millionth."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in PRODUCTS:
            return output
        with _disable_current_modes():  # else torch's own would look for this operation
            return output * (1 + 1e-6)


class Both:
    def __init__(self, *contexts: Any) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def wrong_contexts(policy: Any) -> Any:
    """Those of torch, with kept products that are off in recomputation."""
    forward, again = torch.utils.checkpoint.create_selective_checkpoint_contexts(policy)
    return forward, Both(again, Wrong())


class Watch(TorchDispatchMode):
    """Counts products of many terms, and bytes that operations made and that still live."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.products += args[-2].shape[-1] >= TERMS
        given = {
            StorageWeakRef(x.untyped_storage()).cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and (storage := StorageWeakRef(x.untyped_storage())).cdata not in given:
                self.made[storage.cdata] = storage, x.untyped_storage().nbytes()
        return output

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_products_are_kept_and_nothing_else(compiles: bool) -> None:
    """By the operations that run: LoRA on all layers, in float32 on 16-bit weights, as peft makes it."""
    torch._dynamo.reset()
    model = tiny_model("llama", dtype=torch.bfloat16).train()
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    model.gradient_checkpointing_enable(NOT_REENTRANT)
    model.enable_input_require_grads()
    rows = flexpatch.build_rows([[Tree.of(*random_ids(20, 10, 9))]])
    backend = "flex" if compiles else "dense"
    sizes, products, gradients = {}, {}, {}
    for setting in (0, "partly", None):
        flexpatch.apply(model, backend=backend, compile=compiles, recompute_layers=setting)
        model.zero_grad()
        for _ in range(2):  # the first one compiles, or finds out whether products may be kept
            forward, backward = Watch(), Watch()
            with forward, torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(**flexpatch.model_inputs(model, rows)).last_hidden_state
            sizes[setting] = forward.bytes()
            with backward:
                hidden.float().square().sum().backward()
            products[setting] = backward.products
        gradients[setting] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert sizes[0] > 1.2 * sizes["partly"] > 1.44 * sizes[None]
    assert products[0] == products["partly"] < products[None]
    assert torch.equal(gradients["partly"], gradients[None]) and gradients[0].norm() > 0


def way(layer: Any) -> str:
    """Tell by K, p, a or w what a layer keeps in the call that runs, from everything to nothing; t: it is tried."""
    if layer.gradient_checkpointing is KEPT:
        assert way_of(layer) == "everything"
        return "K"
    made = layer._gradient_checkpointing_func.keywords.get("context_fn")
    found = {None: "w", contexts: "p", attention_contexts: "a"}.get(made, "t")
    assert way_of(layer) == dict(p="products", a="attention").get(found, "nothing")
    return found


def device(limit: float) -> Any:
    """Memory that a test decides."""
    return lambda _: Memory(100, 100, int(limit))


class Auto:
    """Trains a model of four layers with recompute_layers="auto", on a device whose memory a test decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.model = deep("llama", 4)
        self.true = Result.of(self.model, separate(self.model, few()))
        monkeypatch.setattr("flexpatch.forward.Recomputation", partial(Recomputation, memory=device(1e9)))
        self.model.train().gradient_checkpointing_enable(NOT_REENTRANT)
        flexpatch.apply(self.model, recompute_layers="auto", **options)
        self.rows, self.layers = flexpatch.build_rows([few()]), layers_of(self.model.model)
        self.stage = flexpatch.forward.hook_of(self.model).recomputation
        self.seen: list[str] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda layer, _: self.seen.append(way(layer)))

    def ways(self) -> str:
        """Run a step, which must be right. Returns what layers kept."""
        functions = [layer._gradient_checkpointing_func for layer in self.layers]
        self.seen.clear()
        Result.packed(self.model, self.rows).matches(self.true)
        assert [layer._gradient_checkpointing_func for layer in self.layers] == functions
        return "".join(self.seen[: len(self.layers)])  # older transformers call layers again to recompute them

    def stepped(self, room: float, **sizes: float) -> None:
        """Go on as after an optimizer's step, with room for so many bytes a token. Layers keep as many as given."""
        (kind,) = self.stage.sizes.of["everything"]
        for held, size in sizes.items():
            self.stage.sizes.of[held][kind] = size
        self.stage.stepped, tokens = True, self.stage.tokens
        self.stage.memory = device((100 + (room + 0.5) * tokens) / 0.9)


def test_auto_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are measured before the optimizer's first step; then all layers keep what fits."""
    auto = Auto(monkeypatch)
    assert [auto.ways(), auto.ways(), auto.ways()] == ["twwK", "wwwp", "wwww"]
    auto.model.model.embed_tokens.weight.data += 0  # no step yet
    assert not auto.stage.stepped
    for room, expected in ((0, "wwww"), (2, "wwpp"), (4, "pppp"), (5, "pppK"), (8, "KKKK")):
        auto.stepped(room, everything=2, products=1)
        assert auto.ways() == expected, room


class Attentions(Watch):
    """Counts forwards of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs += str(func) == "flex_attention"
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("__call__" in vars(GradientCheckpointingLayer), reason="transformers recomputes whole layers")
@pytest.mark.usefixtures("flex_on_cpu")
def test_compiled_layers_keep_attention_where_products_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured then, in one call, and not before; and it runs once, but in layers that keep nothing."""
    torch._dynamo.reset()
    auto = Auto(monkeypatch, backend="flex", compile=True)
    assert [auto.ways(), auto.ways(), auto.ways()] == ["wwwK", "wwwp", "wwww"]
    auto.stepped(12, everything=6, products=3)
    assert auto.ways() == "pppp" and not auto.stage.sizes.of["attention"]
    auto.stepped(9)
    assert auto.ways() == "wppp" and not auto.stage.sizes.of["attention"]
    auto.stepped(5)
    assert auto.ways() == "wwwa" and len(auto.stage.sizes.of["attention"]) == 1
    for room, expected in ((2, "wwaa"), (4, "aaaa"), (8, "aapp"), (12, "pppp")):
        auto.stepped(room, attention=1)
        with Attentions() as watch:
            assert auto.ways() == expected, room
        assert watch.runs == 4 + expected.count("w"), room


def test_products_that_are_written_over_are_not_kept() -> None:
    """As by Liger's rope, whose kernel leaves no trace: the layer is recomputed wholly, with a warning."""
    model = tiny_model("llama")
    true = oracle("llama", 0, samples=few)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(written_over)
    unpatched = Result.of(model, separate(model, few()))
    unpatched.differs(true, what="queries were changed")
    rows = flexpatch.build_rows([few()])
    partly(model)
    Result.packed(model, rows).matches(unpatched)
    with pytest.warns(flexpatch.FlexpatchWarning, match="recomputes whole layers here"):
        Result.packed(model, rows).matches(unpatched)
    stage = flexpatch.forward.hook_of(model).recomputation
    assert list(stage.survives.values()) == [False]
    stage.survives = dict.fromkeys(stage.survives, True)
    with pytest.raises(AssertionError, match="the gradient is"):  # without being tried
        Result.packed(model, rows).matches(unpatched)


class _WrittenOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.numpy()[...] *= 1.1  # not through torch, like a kernel of Triton's
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.1 * gradient


def written_over(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return _WrittenOver.apply(output)


@parameterized.expand([(RuntimeError,), (KeyboardInterrupt,)])
def test_a_failed_forward_leaves_nothing_behind(kind: type[BaseException]) -> None:
    model = partly(deep("llama", 2))
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]

    def fail(*_: Any) -> None:
        raise kind

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(kind):
        flexpatch.answer_logprobs(model, flexpatch.build_rows([few()]))
    handle.remove()
    flexpatch.remove(model)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions


def test_checkpointing_of_other_kinds_recomputes_whole_layers() -> None:
    model = tiny_model("llama")
    true = oracle("llama", 0, samples=few)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    flexpatch.apply(model, recompute_layers="partly")
    with pytest.warns(flexpatch.FlexpatchWarning, match="recomputes whole layers here"):
        Result.packed(model, flexpatch.build_rows([few()])).matches(true)
    layer = model.model.layers[0]
    for function in (lambda f, *args: f(*args), partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)):
        layer._gradient_checkpointing_func = function
        assert not can_keep_products(layer)


def test_checkpoints_that_are_debugged_recompute_whole_layers() -> None:
    """Torch refuses contexts of others then."""
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable(NOT_REENTRANT | {"debug": True})
    flexpatch.apply(model, recompute_layers="partly")
    with pytest.warns(flexpatch.FlexpatchWarning, match="without debug=True"):
        Result.packed(model, flexpatch.build_rows([few()])).matches(oracle("llama", 0, samples=few))
    layer = model.model.layers[0]
    assert not can_keep_products(layer)
    with set_checkpoint_debug_enabled(False):
        assert can_keep_products(layer)
    model.gradient_checkpointing_enable(NOT_REENTRANT)
    assert can_keep_products(layer)
    with set_checkpoint_debug_enabled(True):
        assert not can_keep_products(layer)
