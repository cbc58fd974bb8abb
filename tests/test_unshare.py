"""Mixers that run on separate sequences, in every mode that people train in: the unpatched model's numbers."""

import copy
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from helpers.hybrids import (
    BRANCHED,
    KINDS,
    SIDES,
    apart,
    batch,
    gradient,
    loss_of,
    mixers,
    step,
    twins,
    unsharing_of,
    with_hole,
)
from helpers.needs import needs_hybrids
from helpers.oracle import see_siblings
from helpers.processes import start_python
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointError, checkpoint

import flexpatch
from flexpatch import FlexpatchWarning, UnsupportedModelError
from flexpatch.arrival import Row
from flexpatch.devices import Card
from flexpatch.float64 import Float64
from flexpatch.fold import fold_batch
from flexpatch.forward import hook_of
from flexpatch.internals import layers_of
from flexpatch.models import tiny_model
from flexpatch.patch import settings_of
from flexpatch.plan import Plan

needs_hybrids()

BOUND = 1e-10
# Recomputed layers, and states in float32, cannot be kept in float64.
ROUNDED = 1e-5
CONTROL = 1000
# Each of another way in which a mixer takes its row.
FAST = ("qwen3_5_text", "qwen3_5_text, branched", "mamba", "deepseek_v32")
# Types on whose output projections peft refuses LoRA.
REFUSED_BY_PEFT = ("nemotron_h", "falcon_h1", "mamba", "mamba2")


def marked(kinds: list[str]) -> Any:
    each = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]
    return pytest.mark.parametrize("kind", each)


every = pytest.mark.parametrize("kind", [*KINDS, *BRANCHED])
kinds = marked([*KINDS, *BRANCHED])
unshared = marked(KINDS)

pytestmark = pytest.mark.filterwarnings("ignore:flexpatch. in training, calls without use_cache")


@pytest.fixture(autouse=True)
def _fold_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@every
def test_padding(kind: str, side: str) -> None:
    """Exact on any side, at padding that predicts a sequence's first token too; or as given, and counted."""
    stock, model = twins(kind)
    call = batch(side)
    with Float64():
        true = step(stock, call)
        if side in ("left", "both") and hook_of(model).folding.padding_skipped is False:
            with pytest.warns(FlexpatchWarning, match="padding in front of a sequence"):
                ours = step(model, call)
            assert all(map(torch.equal, ours, true))
        else:
            ours = step(model, call)
            assert flexpatch.savings(model).folded == 1
            assert apart(ours, true) < BOUND


@unshared
def test_faults_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is far off: padding that mixers do not mask, siblings seen, owners and sequences of others."""
    stock, model = twins(kind)
    side = "right" if hook_of(model).folding.padding_skipped is False else "left"
    call = batch(side)
    with Float64():
        true = step(stock, call)
        assert apart(step(model, call), true) < BOUND
        batches, owners = Plan.batches, Plan.owners
        faults: dict[str, Any] = {
            "owners": property(lambda plan: owners.__get__(plan).roll(1, -1)),
            "batches": property(lambda plan: [index.roll(1, 1) for index in batches.__get__(plan)]),
        }
        if side == "left":
            faults["masks"] = property(lambda plan: [None] * len(plan.batches))
        for name, fault in faults.items():
            with monkeypatch.context() as patched:
                patched.setattr(Plan, name, fault)
                hook_of(model).folding.latest = None
                assert apart(step(model, call), true) > CONTROL * BOUND, name
        with monkeypatch.context() as patched:
            patched.setattr("flexpatch.folding.fold_batch", siblings_seen)
            hook_of(model).folding.latest = None
            assert apart(step(model, call), true) > CONTROL * BOUND


def siblings_seen(*batch: Any) -> Any:
    from dataclasses import replace

    folded = fold_batch(*batch)
    return folded and replace(folded, rows=see_siblings(folded.rows))


@unshared
def test_a_mixer_left_on_the_row_is_an_error(kind: str) -> None:
    _, model = twins(kind)
    mixer = mixers(model)[0]
    mixer._forward_pre_hooks.clear()
    # Attention that gets no mask may stop before.
    with pytest.raises((UnsupportedModelError, TypeError), match=r"ran on separate sequences|NoneType"):
        model(**batch("right"))


def padding_free() -> dict[str, Any]:
    """A row of four sequences, two and two alike at their beginnings, whose positions restart."""
    call = batch("right")
    rows = [ids[mask.bool()] for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True)][:4]
    positions = [torch.arange(len(row)) for row in rows]
    return dict(input_ids=torch.cat(rows)[None], position_ids=torch.cat(positions)[None], use_cache=False)


def with_boundaries() -> dict[str, Any]:
    call = padding_free()
    starts = (call["position_ids"][0] == 0).nonzero()[:, 0]
    bounds = torch.cat([starts, torch.tensor([call["input_ids"].shape[1]])]).int()
    longest = int(bounds.diff().max())
    return call | dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest)


GIVEN = {
    "hole": (lambda: with_hole(batch("right")), "padding inside a sequence"),
    "restarts": (padding_free, "position_ids that do not count a sequence's columns"),
}


@pytest.mark.parametrize("case", GIVEN)
@every
def test_holes_and_restarts(kind: str, case: str) -> None:
    """States run over them, so these batches run as given; attention that is masked folds them."""
    make, reason = GIVEN[case]
    stock, model = twins(kind)
    with Float64(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        true, ours = step(stock, make()), step(model, make())
    saved = flexpatch.savings(model) if hook_of(model).folding.counts else None
    if hook_of(model).folding.padding_skipped is None:
        assert saved.folded == 1 and apart(ours, true) < BOUND
        return
    assert all(map(torch.equal, ours, true))
    if saved is None:  # no position ids reach a model without attention
        assert case == "restarts" and kind.startswith("mamba")
        return
    assert saved.folded == 0 and any(reason in each for each in saved.reasons)
    assert any(reason in str(warning.message) for warning in caught)


@every
def test_boundaries_of_sequences_are_the_mixers_own(kind: str) -> None:
    """Stock's fallbacks may refuse them; a patched model does as stock does."""
    found = []
    stock, model = twins(kind)
    if hook_of(model).folding.padding_skipped is None:
        pytest.skip("its mixers have no states")
    for each in (stock, model):
        try:
            found.append(each(**with_boundaries()).logits)
        except Exception as error:
            found.append(str(error))
    assert found[0] == found[1] if isinstance(found[0], str) else torch.equal(*found)
    assert not any(counts.reason is None for counts in hook_of(model).folding.counts)


# --- calls -----------------------------------------------------------------------------------------------------------


@kinds
def test_caches_and_generation(kind: str) -> None:
    """Bit-identical, before and after a folded batch."""
    stock, model = twins(kind, torch.float32)
    call = batch("left")
    prompts = {name: call[name] for name in ("input_ids", "attention_mask")}
    for _ in range(2):
        for settings in (dict(do_sample=False), dict(do_sample=False, num_beams=2)):
            tokens = [m.generate(**prompts, max_new_tokens=5, pad_token_id=0, **settings) for m in (stock, model)]
            assert torch.equal(*tokens)
        cached = [m(**prompts, use_cache=True).logits for m in (stock, model)]
        assert torch.equal(*cached)
        model(**batch("right"))
    assert flexpatch.savings(model).folded == 2


@kinds
def test_disabled(kind: str) -> None:
    stock, model = twins(kind)
    call = batch("right")
    with flexpatch.disabled(model):
        assert all(map(torch.equal, step(model, call), step(stock, call)))
    step(model, call)
    assert flexpatch.savings(model).batches == flexpatch.savings(model).folded == 1


def traces(model: nn.Module) -> list[str]:
    """What a patch left on a model's modules."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found += [f"{name}: {hook}" for hook in hooks if "flexpatch" in str(hook)]
        flags = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
        found += [f"{name}: flags {flag}" for flag in (*flags, module._forward_hooks_always_called) if flag]
        found += [f"{name}: {key}" for key, value in vars(module).items() if "flexpatch" in type(value).__module__]
    return found


@kinds
def test_applying_and_removing(kind: str) -> None:
    stock, model = twins(kind)
    once = traces(model)
    settings = settings_of(model)
    assert len(once) >= len(mixers(model))
    assert len(traces(flexpatch.apply(model, **settings))) == len(once)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    step(model, batch("right"))
    assert len(traces(model)) == len(once), "a step leaves nothing behind"
    model.gradient_checkpointing_disable()
    flexpatch.remove(model.eval())
    assert not traces(model)
    assert all(map(torch.equal, step(model, batch("right")), step(stock, batch("right"))))


@pytest.mark.parametrize(
    "names", [FAST, pytest.param([*KINDS, *BRANCHED], marks=pytest.mark.slow)], ids=["one of each way", "all"]
)
def test_copies(names: Sequence[str], tmp_path: Path) -> None:
    """Deep copies, and pickles in another process: each has hooks of its own mixers."""
    for number, kind in enumerate(names):
        _, model = twins(kind)
        call = batch("right")
        true = step(model, call)
        copied = copy.deepcopy(model)
        assert unsharing_of(copied) is not unsharing_of(model)
        flexpatch.remove(model)
        assert all(map(torch.equal, step(copied, call), true)), kind
        assert flexpatch.savings(copied).folded == 2
        hook = hook_of(copied)
        assert bool(hook.branches.kinds) == (kind in BRANCHED) != bool(hook.mixers), kind
        (tmp_path / str(number)).write_bytes(pickle.dumps((copied, call, true, hook.branches.kinds, hook.mixers)))
    code = """
import pathlib, pickle, sys, torch, flexpatch
torch.set_num_threads(1)
from helpers.hybrids import step
flexpatch.folding.gains = lambda *args: True
for file in sys.argv[1:]:
    model, call, true, kinds, mixers = pickle.loads(pathlib.Path(file).read_bytes())
    assert all(map(torch.equal, step(model, call), true)), file
    assert flexpatch.savings(model).folded == 3, file
    hook = flexpatch.forward.hook_of(model)
    assert (hook.branches.kinds, hook.mixers) == (kinds, mixers), file
"""
    start_python(["-c", code, *map(str, range(len(names)))], tmp_path)


@pytest.mark.parametrize("call_of_mixer", [0, 1])
@kinds
def test_an_error_inside_a_mixer(kind: str, call_of_mixer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first batch of sequences or a later one: nothing is left behind, and the next call is right."""
    _, model = twins(kind)
    if call_of_mixer and kind in BRANCHED:
        pytest.skip("mixers that are branched run once")
    call = batch("right")
    before, true = len(traces(model)), step(model, call)
    mixer = mixers(model)[1]
    forward, calls = mixer.forward, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call_of_mixer + 1:
            raise ZeroDivisionError
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(mixer, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            step(model, call)
    now = unsharing_of(model).now
    assert now.row is None and now.inside == [] and len(traces(model)) == before
    assert all(map(torch.equal, step(model, call), true))


@kinds
def test_an_error_in_recomputation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = twins(kind)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    call = batch("right")
    true = step(model, call)
    loss, _ = loss_of(model, call)
    with monkeypatch.context() as patched:
        patched.setattr(mixers(model)[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    model.zero_grad()
    assert all(map(torch.equal, step(model, call), true))


# --- recomputation ---------------------------------------------------------------------------------------------------


def wrap(model: nn.Module, impl: CheckpointImpl) -> None:
    """Torch's wrapper around each decoder layer, as FSDP's users put it."""
    layers = layers_of(model.base_model)
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and layers and child[0] is layers[0]:
            for i, layer in enumerate(child):
                child[i] = checkpoint_wrapper(layer, checkpoint_impl=impl)


WAYS: dict[str, Any] = {
    "non-reentrant": dict(use_reentrant=False),
    "reentrant": dict(use_reentrant=True),
    "recompute_layers": dict(use_reentrant=False),
    "wrapped": CheckpointImpl.NO_REENTRANT,
    "wrapped, reentrant": CheckpointImpl.REENTRANT,
}


@pytest.mark.parametrize("way", WAYS)
@kinds
def test_recomputation(kind: str, way: str) -> None:
    """The gradients of layers that are not recomputed, also when another row of equal shape runs before backward."""
    stock, model = twins(kind)
    first, other = batch("right"), batch("right", seed=1)
    true = [step(m.train(), first) for m in (stock, model)]
    assert apart(true[1], true[0]) < ROUNDED
    if way == "recompute_layers":
        flexpatch.apply(model, **settings_of(model) | dict(recompute_layers=2))
    if way.startswith("wrapped"):
        wrap(model, WAYS[way])
    else:
        model.gradient_checkpointing_enable(WAYS[way])
    if "reentrant" in way and "non" not in way:
        model.enable_input_require_grads()
    assert apart(step(model, first), true[1]) < BOUND
    loss, logits = loss_of(model, first)
    with torch.no_grad():
        model(**other)
    model(**batch("right", swapped=True))
    loss.backward()
    assert apart((logits, gradient(model)), true[1]) < BOUND
    assert flexpatch.savings(model).folded == flexpatch.savings(model).batches


class Forgetful(Row):
    """A row whose plan does not travel with its call: it is that of the latest row."""

    latest: ClassVar[list[Plan]] = []

    @property
    def plan(self) -> Plan:
        return self.latest[-1]

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.latest.append(plan)


@kinds
def test_recomputation_with_another_rows_plan_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: other gradients, or an error."""
    _, model = twins(kind)
    call = batch("right")
    true = step(model.train(), call)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(Forgetful, "latest", [])
    monkeypatch.setattr("flexpatch.forward.Row", Forgetful)
    loss, logits = loss_of(model, call)
    model(**batch("right", swapped=True))
    mine, other = Forgetful.latest
    assert mine is not other and mine.shape == other.shape
    try:
        loss.backward()
    except Exception:
        return
    assert apart((logits, gradient(model)), true) > CONTROL * BOUND


@pytest.mark.parametrize("reentrant", [True, False])
@kinds
def test_a_plain_checkpoint_of_torch(kind: str, reentrant: bool) -> None:
    """Around a layer's forward, out of our sight: the gradients, or an error; never others."""
    _, model = twins(kind)
    call = batch("right")
    true = step(model.train(), call)
    for layer in layers_of(model.base_model):
        layer.forward = checkpointed(layer.forward, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    try:
        ours = step(model, call)
    except (UnsupportedModelError, CheckpointError) as error:
        assert isinstance(error, CheckpointError) != reentrant and "recompute" in str(error)
        return
    assert apart(ours, true) < BOUND


def checkpointed(forward: Any, reentrant: bool) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        def again(*args: Any) -> Any:
            return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=reentrant)

    return run


# --- adapters, precision, routers ------------------------------------------------------------------------------------


def linears(model: nn.Module) -> list[str]:
    """Names of all linear layers and convolutions in a patched model's mixers."""
    within = {id(module): name for name, module in model.named_modules()}
    layers = (module for mixer in mixers(model) for module in mixer.modules())
    names = [within[id(layer)] for layer in layers if isinstance(layer, (nn.Linear, nn.Conv1d))]
    return [name for name in names if not refused_by_peft(model, name)]


def refused_by_peft(model: nn.Module, name: str) -> bool:
    """peft keeps adapters off these: kernels of Mamba read the weights by themselves; convolutions in groups."""
    layer = model.get_submodule(name)
    grouped = isinstance(layer, nn.Conv1d) and layer.groups > 1
    return grouped or (name.endswith("out_proj") and model.config.model_type in REFUSED_BY_PEFT)


@kinds
def test_lora(kind: str) -> None:
    """On the mixers' linear layers: logits and gradients, with adapters on and off."""
    base = twins(kind)[1]
    targets = linears(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).double()
    call = batch("right")
    with Float64():
        ours = step(model, call)
        with model.disable_adapter(), torch.no_grad():
            without = model(**call).logits
        assert flexpatch.savings(model).folded == 2
        flexpatch.remove(model)
        true = step(model, call)
        with model.disable_adapter(), torch.no_grad():
            base_logits = model(**call).logits
    assert apart(ours, true) < BOUND
    mask = call["attention_mask"].bool()
    assert apart((without[mask],), (base_logits[mask],)) < BOUND
    assert apart((without[mask],), (model(**call).logits[mask],)) > CONTROL * BOUND, "adapters must matter"


@kinds
def test_autocast(kind: str) -> None:
    """As far from float32 as stock under autocast is, within a factor of two."""
    stock, model = twins(kind, torch.float32)
    call = batch("right")
    true = step(stock, call)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = step(stock, call), step(model, call)
    assert flexpatch.savings(model).folded == 1
    for mine, other, right in zip(ours, theirs, true, strict=True):
        assert (mine - right).norm() < 2 * (other - right).norm()
        assert mine.dtype == other.dtype


@kinds
def test_router_logits(kind: str) -> None:
    stock, model = twins(kind)
    if not hasattr(stock.config, "router_aux_loss_coef"):
        pytest.skip("not a mixture with a router loss")
    call = batch("right") | dict(output_router_logits=True)
    call["labels"] = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    with Float64():
        true, ours = stock(**call), model(**call)
    assert flexpatch.savings(model).folded == 1
    assert abs(true.aux_loss) > 1e-3 and abs(ours.aux_loss - true.aux_loss) < BOUND
    assert abs(ours.loss - true.loss) < BOUND


@unshared
def test_compiled_layers_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="each would compile anew"):
        flexpatch.apply(tiny_model(kind), compile=True)


@unshared
def test_weights_that_are_gathered_within_mixers(kind: str) -> None:
    """ZeRO-3 and FSDP within layers: all ranks make one call of each mixer, whatever their rows hold."""
    stock, model = twins(kind)
    call = batch("right")
    counts: list[int] = []
    layer = next(module for module in mixers(model)[0].modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda *_: counts.append(1))
    with Float64():
        true = step(stock, call)
        assert apart(step(model, call), true) < BOUND and len(counts) > 1
        counts.clear()
        layer.weight.ds_id = 0
        assert apart(step(model, call), true) < BOUND and len(counts) == 1


@pytest.mark.parametrize("applied", ["before", "after"])
@pytest.mark.usefixtures("one_rank")
@kinds
def test_sharded_mixers(kind: str, applied: str) -> None:
    """FSDP2 around each mixer gives it another class, and its weights for one call; whichever came first."""
    stock, model = twins(kind)
    call = batch("right")
    if applied == "after":
        settings = settings_of(model)
        flexpatch.remove(model)
    found = mixers(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*found, model):
        fully_shard(module, mesh=mesh)
    if applied == "after":
        flexpatch.apply(model, **settings)
    assert all(isinstance(mixer, FSDPModule) for mixer in found)
    with Float64():
        true = step(stock, call)
        loss, logits = loss_of(model, call)
    loss.backward()
    whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    ours = logits, torch.cat([gradient.flatten() for gradient in whole if gradient is not None])
    assert apart(ours, true) < BOUND and flexpatch.savings(model).folded == 1


def test_all_kinds() -> None:
    """Tensors of a plan are made where the rows are."""
    assert KINDS and isinstance(Plan(torch.tensor([[1]])).owners, Tensor)


@pytest.mark.parametrize("triton", ["3.3.1", "3.4.0", "3.6.0", "3.7.1"])
@pytest.mark.parametrize("card", ["H100", "A100"])
def test_kernels_whose_gradients_are_wrong_are_refused(triton: str, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention refuses them too, but only in the first backward pass."""
    capability = {"H100": (9, 0), "A100": (8, 0)}[card]
    monkeypatch.setattr("flexpatch.mixers.card_of", lambda device: Card("cuda", card, capability))
    monkeypatch.setattr("flexpatch.mixers.find_spec", lambda name: None if name == "tilelang" else name)
    monkeypatch.setattr("flexpatch.mixers.metadata.version", lambda name: triton)
    model = tiny_model("qwen3_5_text")
    if card == "H100" and triton in ("3.4.0", "3.6.0"):
        with pytest.raises(UnsupportedModelError, match="wrong gradients of the gated delta rule with Triton 3"):
            flexpatch.apply(model)
        assert not flexpatch.is_applied(model)
        model.requires_grad_(False)
    flexpatch.apply(model)
