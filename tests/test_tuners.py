"""Every tuner and setting of the installed peft: proven exact against the unpatched model, or refused."""

import copy
import dataclasses
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from helpers.oracle import BOUNDS, CONTROL, Result, see_siblings, separate
from helpers.tuner_kinds import EXACT, REFUSED, TREES, Maker, adapted, bare, batch, corda, eva, lora_ga, of
from parameterized import parameterized
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.distributed.fsdp import FSDPModule

import flexpatch
from flexpatch import FlexpatchWarning, UnsupportedModelError, build_rows, folding, refusals, tuners
from flexpatch.tuners import tuner_table

# Some tuners compute in float32 within: the unpatched model differs so much between two shapes of its own batch.
NOISE = (1e-5, 1e-5)


@pytest.fixture(autouse=True)
def always_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)


def twin(model: nn.Module, kind: str) -> nn.Module:
    """A copy of a model that has not run yet."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # trainable tokens of peft 0.20 cannot be copied
        return adapted(EXACT[kind], model.training)


def padded(model: nn.Module) -> Result:
    return Result.of(model, flexpatch.separate_logprobs(model, TREES))


def slowly(kind: str) -> Any:
    """Options of rarer tuners are left to the slow tests."""
    return pytest.param(kind, marks=[pytest.mark.slow] if " " in kind and not kind.startswith("LORA") else [])


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
@pytest.mark.parametrize("kind", map(slowly, EXACT))
def test_exact(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and gradients of what is trained, on rows and folded batches, without and with adapters."""
    # Each way of running has a new model: some adapters remember calls.
    fresh = adapted(EXACT[kind], training)
    stock = twin(fresh, kind)
    true = Result.of(stock, separate(stock, TREES))
    batched = padded(twin(fresh, kind))
    noise = batched.errors(true)
    assert noise[0] <= NOISE[0] and noise[1] <= NOISE[1], "the unpatched model looks at more than one sequence"
    bounds = (max(BOUNDS[0], 8 * noise[0]), max(BOUNDS[1], 8 * noise[1]))

    rows = build_rows([TREES])
    model = flexpatch.apply(twin(fresh, kind))
    Result.packed(model, rows).matches(true, bounds)
    Result.packed(model, see_siblings(rows)).differs(true, bounds)
    if isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        with torch.no_grad(), stock.disable_adapter(), model.disable_adapter():
            base, reference = separate(stock, TREES[:1]).tokens, flexpatch.answer_logprobs(model, rows).tokens
        assert (reference[: len(base)] - base).abs().max() <= BOUNDS[0]
        assert (true.tokens[: len(base)] - base).abs().max() > CONTROL * bounds[0], "the adapters must matter"

    model = flexpatch.apply(twin(fresh, kind))
    padded(model).matches(batched, bounds)
    assert flexpatch.savings(model).folded == 1
    fold = folding.fold_batch

    def broken(*args: Any, **more: Any) -> Any:
        folded = fold(*args, **more)
        return dataclasses.replace(folded, rows=see_siblings(folded.rows))

    monkeypatch.setattr("flexpatch.folding.fold_batch", broken)
    padded(flexpatch.apply(fresh)).differs(batched, bounds)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At apply, or at the first call if the adapters come later; and without that it would go wrong."""
    maker, reason = REFUSED[kind]
    match = f"(?i){kind.split()[-1]}.*{re.escape(reason)}.*flexpatch.remove"
    with pytest.raises(UnsupportedModelError, match=match):
        flexpatch.apply(adapted(maker))
    rows, late = build_rows([TREES]), adapted(maker, training=True, patched_before=True)
    with pytest.raises(UnsupportedModelError, match=match):
        flexpatch.answer_logprobs(late, rows)
    if kind in ("POLY", "MULTITASK_PROMPT_TUNING"):
        return  # the unpatched model, too, wants a task for each sequence

    own_tokens = reason == "tokens of its own"
    batched = padded(adapted(maker, training=True))
    if own_tokens:  # such calls do not tell their tokens, and run as given
        padded(late).matches(batched)
        assert flexpatch.savings(late).folded == 0
    else:
        with pytest.raises(UnsupportedModelError, match=match):
            padded(late)
    monkeypatch.setattr(refusals, "refusal", lambda module: None)
    stock, patched, again = (adapted(maker, training=True, patched_before=late) for late in (False, True, True))
    true = Result.of(stock, separate(stock, TREES))
    wrong = [wrongness(lambda: Result.packed(patched, rows), true), wrongness(lambda: padded(again), batched)]
    assert any(wrong), "exact after all"


def wrongness(run: Callable[[], Result], true: Result) -> bool:
    """Whether a run fails inside, or gives other numbers than the unpatched model."""
    try:
        return max(run().errors(true)) > CONTROL * BOUNDS[1]
    except (RuntimeError, ValueError, IndexError):
        return True


def test_registry() -> None:
    """A tuner that is new to peft must be looked at: proven above, or refused."""
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        tuner = peft_type.value
        assert (tuner in tuners.EXACT) != (tuner in tuners.REFUSED), f"{tuner} is new: prove it in EXACT or REFUSED"
        kinds = EXACT if tuner in tuners.EXACT else {**REFUSED, "XLORA": ()}
        assert any(kind.split()[0] == tuner for kind in kinds), f"no kind of {tuner} is tested"
        for owner in filter(None, (config, PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type))):
            assert owner.__module__.startswith(f"peft.tuners.{tuner.lower()}."), "layers are told by their package"


@pytest.mark.heavy("bitsandbytes")  # which peft's layers over it import
def test_layers() -> None:
    """Every module class of peft has the verdict of its tuner; what no tuner is known by is refused."""
    unlike = set()
    for module in pkgutil.walk_packages(peft.__path__, "peft."):
        with mock.patch.dict(sys.modules, {"attr": dataclasses}):
            members = vars(importlib.import_module(module.name)).values()
        layers = [kind for kind in members if isinstance(kind, type) and kind.__module__ == module.name]
        for kind in (kind for kind in layers if issubclass(kind, nn.Module) and "forward" in vars(kind)):
            tuner = module.name.split(".")[2].upper() if module.name.startswith("peft.tuners.") else "LORA"
            exact = tuners._judge(kind)[1] is None
            if exact != (tuner in tuners.EXACT or tuner.lower() in tuners._COMMON):
                unlike.add(f"{module.name}.{kind.__name__}")
    assert unlike <= {
        *(f"peft.tuners.{tuner}.layer.Conv1d" for tuner in ("hira", "loha", "lokr", "lora")),
        "peft.tuners.lora.monteclora.MontecloraSampler",
        "peft.tuners.lora.tp_layer.LoraParallelLinear",
    }


def test_variants() -> None:
    """Every variant of LoRA is proven or refused; those of convolutions over images have no row to look at."""
    found = {name for name, kind in vars(variants).items() if isinstance(kind, type) and issubclass(kind, LoraVariant)}
    found = {name for name in found - {"LoraVariant"} if "Conv" not in name}
    assert found <= tuners.EXACT_VARIANTS | set(tuners.REFUSED_VARIANTS)
    kinds = [kind for kind in EXACT if kind.startswith("LORA") and "init" not in kind]
    kinds += [kind for kind in EXACT if kind == "LORA init mica"]
    used = {variant for kind in kinds for variant in variants_of(adapted(EXACT[kind]))}
    used |= variants_of(quantized("gptq", "GPTQLoraLinear", use_qalora=True))
    assert used - {"VeloraLinearVariant"} == tuners.EXACT_VARIANTS & found, "proven, or only claimed?"


def variants_of(model: nn.Module) -> set[str]:
    layers = (layer for layer in model.modules() if isinstance(layer, LoraLayer))
    return {type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()}


def test_inits() -> None:
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    named = set(re.findall(r"'(\w+)", str(fields["init_lora_weights"].type)))
    assert {name.split("_niter_")[0] for name in named} <= tuners.EXACT_INITS
    model = adapted(EXACT["LORA"])
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    flexpatch.apply(model)
    model.peft_config["default"].init_lora_weights = "new"
    with pytest.raises(UnsupportedModelError, match=r"'default' \(LORA\) with init_lora_weights='new' is unknown"):
        flexpatch.apply(model)


# Settings that mean the same to every tuner.
SHARED = (
    "peft_type task_type peft_version auto_mapping base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save fan_in_fan_out r alpha rank_pattern "
    "alpha_pattern bias init_weights random_seed"
)
LORA_SETTINGS = (
    "lora_alpha lora_dropout use_rslora init_lora_weights megatron_config megatron_core trainable_token_indices "
    "loftq_config eva_config corda_config lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora "
    "qalora_group_size monteclora_config layer_replication runtime_config lora_bias target_parameters use_bdlora "
    "arrow_config kasa_config ensure_weight_tying"
)
# What was read and found not to look at tokens, or is a kind above; a name's values follow it where peft lists them.
SETTINGS = {
    "ADALORA": f"{LORA_SETTINGS} target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
    "ADAMSS": "num_subspaces subspace_rank use_asa asa_target_subspaces init_warmup final_warmup mask_interval "
    "asa_importance_beta asa_uncertainty_beta asa_schedule_exponent use_dynamic_rank svd_threshold "
    "init_weights:orthogonal",
    "ADAPTION_PROMPT": "adapter_len adapter_layers",
    "BEFT": "",
    "BONE": "init_weights:bat",
    "BOFT": "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout",
    "C3A": "block_size block_size_pattern init_weights:gaussian|kaiming_uniform|xavier_uniform",
    "DEFT": "decomposition_method:relu|qr init_scale para deft_dropout",
    "DELORA": "delora_lambda module_dropout lambda_pattern",
    "FOURIERFT": "n_frequency scaling random_loc_seed n_frequency_pattern",
    "FROD": "projection_prng_key save_projection frod_dropout sparse_rate regularization_alpha progressbar "
    "runtime_offload_base_weight",
    "GLORA": "config_A_B:lora|vector|constant|none config_C:lora|vector|none config_D_E:vector|constant|none",
    "GRALORA": "hybrid_r gralora_dropout gralora_k",
    "HIRA": "hira_dropout init_weights:gaussian",
    "HRA": "apply_GS",
    "IA3": "feedforward_modules init_ia3_weights",
    "LN_TUNING": "",
    "LOHA": "rank_dropout module_dropout use_effective_conv2d",
    "LOKR": "rank_dropout module_dropout use_effective_conv2d decompose_both decompose_factor rank_dropout_scale "
    "init_weights:lycoris",
    "LORA": LORA_SETTINGS,
    "MISS": "miss_dropout mini_r init_weights:bat|mini",
    "OFT": "oft_block_size module_dropout coft eps block_share use_cayley_neumann num_cayley_neumann_terms",
    "OSF": "effective_rank target_svd_config",
    "PEANUT": "depth act_fn scaling",
    "PSOFT": "psoft_alpha psoft_dropout ab_svd_init:psoft_init|pissa_init psoft_svd:full|lowrank "
    "psoft_svd_lowrank_niter psoft_orth psoft_mag_b psoft_mag_a use_cayley_neumann num_cayley_neumann_terms "
    "cayley_neumann_eps",
    "RANDLORA": "projection_prng_key save_projection sparse very_sparse randlora_dropout randlora_alpha",
    "ROAD": "variant group_size",
    "SHIRA": "mask_type:random",
    "SUPERTUNING": "sparsity select_top lora_alpha lora_dropout save_precomputed_indices",
    "TINYLORA": "u weight_tying projection_seed save_projection init_v_bound tinylora_dropout",
    "TRAINABLE_TOKENS": "token_indices",
    "UNILORA": "proj_seed theta_d_length unilora_dropout init_theta_d_bound save_indices",
    "VBLORA": "num_vectors vector_length topk save_only_topk_weights vblora_dropout init_vector_bank_bound "
    "init_logits_std",
    "VERA": "projection_prng_key save_projection vera_dropout d_initial",
    "WAVEFT": "n_frequency scaling wavelet_family use_idwt random_loc_seed n_frequency_pattern proportional_parameters",
}


def test_settings() -> None:
    """A setting or value that is new to peft must be looked at, as each of these was."""
    for tuner in tuners.EXACT & {peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}:
        known = {name: values for name, _, values in (each.partition(":") for each in SETTINGS[tuner].split())}
        for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[tuner]):
            assert field.name in known.keys() | set(SHARED.split()), (
                f"{tuner} has a new setting {field.name}: what does it do?"
            )
            values = re.findall(r"'([^']+)'", str(field.type)) if "Literal" in str(field.type) else []
            if field.name not in ("bias", "init_lora_weights"):
                assert set(values) <= set(known.get(field.name, "").split("|")), f"{tuner}: {field.name} is {values}"


def quantized(file: str, kind: str, **settings: Any) -> nn.Module:
    """A layer of LoRA over a quantizer's, in whose place is a plain one."""
    module = importlib.import_module(f"peft.tuners.lora.{file}")
    config = peft.LoraConfig(r=4, init_lora_weights=False, qalora_group_size=4, **settings)
    given: dict[str, Any] = dict(config=config)
    if "config" not in signature(LoraLayer.update_layer).parameters:  # before peft 0.19
        given = dict(init_lora_weights=False, qalora_group_size=4, **settings)
    torch.manual_seed(0)
    return getattr(module, kind)(nn.Linear(16, 12), adapter_name="default", r=4, lora_alpha=4, **given).double()


def token_by_token(layer: nn.Module) -> tuple[float, float]:
    """How much a layer's outputs and gradients differ between a row and its tokens alone."""
    generator = torch.Generator().manual_seed(2)
    row, seeds = (torch.randn(1, 9, size, generator=generator, dtype=torch.float64) for size in (16, 12))
    parameters = [p for p in layer.parameters() if p.requires_grad]
    whole, alone = layer(row), torch.cat([layer(token) for token in row.split(1, dim=1)], 1)
    pairs = [torch.autograd.grad((out * seeds).sum(), parameters) for out in (whole, alone)]
    return float((whole - alone).abs().max()), max(float((a - b).abs().max()) for a, b in zip(*pairs, strict=True))


QUANTIZED = [("aqlm", "AqlmLoraLinear"), ("awq", "AwqLoraLinear"), ("gptq", "GPTQLoraLinear"), ("te", "TeLinear")]


@parameterized.expand([each for each in QUANTIZED if find_spec(f"peft.tuners.lora.{each[0]}")])
def test_layers_over_quantizers(file: str, kind: str) -> None:
    """What LoRA adds to them; the quantizers themselves are not looked at here."""
    check_layers(file, kind)


@parameterized.expand([("Linear4bit",), ("Linear8bitLt",)])
@pytest.mark.heavy("bitsandbytes")
def test_layers_over_bitsandbytes(kind: str) -> None:
    check_layers("bnb", kind)


def check_layers(file: str, kind: str) -> None:
    """Tokens stay apart in a layer of LoRA over a quantizer's."""
    for variant in ({}, {"use_qalora": True}) if file == "gptq" else ({},):
        assert max(token_by_token(quantized(file, kind, **variant).train())) < 1e-12


@pytest.mark.skipif("LILY" not in REFUSED, reason="needs a peft that has Lily: 0.19 or newer")
def test_a_layer_that_averages_is_seen_as_one() -> None:
    """The negative control of token_by_token."""
    lily = next(
        layer
        for layer in adapted(REFUSED["LILY"][0]).modules()
        if type(layer).__name__ == "Linear" and hasattr(layer, "lily_router")
    )
    lily.base_layer = nn.Linear(64, 64).double()
    row = torch.randn(1, 9, 64, dtype=torch.float64)
    assert (lily(row) - torch.cat([lily(token) for token in row.split(1, dim=1)], 1)).abs().max() > 1e-3


RATES = [
    (tuner, field.name)
    for tuner, config in ((peft_type.value, c) for peft_type, c in PEFT_TYPE_TO_CONFIG_MAPPING.items())
    for field in dataclasses.fields(config)
    if tuner in tuners.EXACT and re.search("dropout(?!_scale)", field.name)
]


@parameterized.expand(RATES)
def test_dropout(tuner: str, rate: str) -> None:
    """Every dropout of every tuner is refused while it is active, however it is made, and only then."""
    more = dict(r=4) if tuner == "SUPERTUNING" else dict(boft_block_size=16) if tuner == "BOFT" else {}
    more = dict(oft_block_size=8) if tuner == "OFT" else more
    more |= dict(total_step=10) if tuner == "ADALORA" else {}
    more |= dict(r=4) if tuner in ("VERA", "RANDLORA") else {}
    more |= dict(vector_length=16) if tuner == "VBLORA" else {}
    more |= dict(progressbar=False) if tuner == "FROD" else {}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[tuner].__name__
    # Adapters that come after apply: before it, their dropout is refused there.
    model = adapted(of(config, target_modules=["q_proj"], **more | {rate: 0.5}), patched_before=True)
    rows = build_rows([TREES])
    flexpatch.answer_logprobs(model, rows)
    model.train()
    for run in (lambda: flexpatch.answer_logprobs(model, rows), lambda: padded(model)):
        with pytest.raises(UnsupportedModelError, match=r"(dropout 0.5|dropout \{'\w+': 0.5\}).* is active.*0.0"):
            run()


def test_x_lora(tmp_path: Path) -> None:
    adapted(EXACT["LORA init False"]).save_pretrained(tmp_path)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters={"0": str(tmp_path), "1": str(tmp_path)}
    )
    with pytest.raises(UnsupportedModelError, match=r"XLORA.*mixes its adapters.*flexpatch.remove"):
        flexpatch.apply(peft.get_peft_model(bare(), config))
    model = peft.get_peft_model(flexpatch.apply(bare()), config).double()
    with pytest.raises(UnsupportedModelError, match=r"XLORA.*mixes its adapters"):
        flexpatch.answer_logprobs(model, build_rows([TREES]))
    backbone = model.base_model.lora_model.model.model
    with pytest.raises(UnsupportedModelError, match=r"xlora.*XLORA.*mixes its adapters"):
        refusals.check_mode(backbone)  # all that a folded batch sees


def test_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is exact by default: tuners, variants, layers of users."""
    match = "is unknown to this version of flexpatch.*flexpatch.remove"
    monkeypatch.setattr(tuners, "EXACT", tuners.EXACT - {"VERA"})
    tuners._verdicts.clear()
    with pytest.raises(UnsupportedModelError, match=rf"VERA.*{match}"):
        flexpatch.apply(adapted(EXACT["VERA"]))
    late = adapted(EXACT["VERA"], patched_before=True)
    with pytest.raises(UnsupportedModelError, match=rf"VERA.*{match}"):
        padded(late)
    tuners._verdicts.clear()

    class NewLinearVariant(variants.DoraLinearVariant):
        pass

    model = adapted(EXACT["LORA dora"])
    layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    layer.lora_variant["default"] = NewLinearVariant()
    with pytest.raises(UnsupportedModelError, match=rf"LoRA's NewLinearVariant.*{match}"):
        flexpatch.apply(model)

    class Averaged(nn.Module, LoraLayer):
        def __init__(self, base_layer: nn.Module, adapter_name: str, **_: Any) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base_layer(hidden) + hidden.mean(1, keepdim=True)

    config = peft.LoraConfig(target_modules=["q_proj"])
    config._register_custom_module({nn.Linear: Averaged})
    with pytest.raises(UnsupportedModelError, match=rf"Averaged, which derives from peft's, {match}"):
        flexpatch.apply(peft.get_peft_model(bare(), config))


def test_sharded_layers() -> None:
    """FSDP gives modules classes of its own, which lie in torch."""
    for kind, exact in (("LORA", True), ("POLY", False)):
        model = adapted(EXACT[kind] if exact else REFUSED[kind][0])
        layer = next(layer for layer in model.modules() if type(layer).__module__.endswith(f"{kind.lower()}.layer"))
        sharded = type("FSDPLinear", (FSDPModule, type(layer)), {"__module__": FSDPModule.__module__})
        assert (tuners._judge(sharded)[1] is None) == exact


def test_convolutions() -> None:
    """They look at neighbouring tokens."""
    model = bare()
    model.model.short = nn.Conv1d(4, 4, 3)
    with pytest.raises(UnsupportedModelError, match=r"convolves neighbouring tokens.*target_modules"):
        flexpatch.apply(peft.get_peft_model(model, peft.LoraConfig(target_modules=["short", "q_proj"])))


def test_an_adapter_for_each_sequence() -> None:
    """Calls with peft's mixed batches run as given."""
    model = EXACT["LORA init False"](bare()).double().eval()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        true, plain = model.double()(**batch(), adapter_names=names).logits, model(**batch()).logits
        flexpatch.apply(model)
        with pytest.warns(FlexpatchWarning, match="with adapter_names"):
            assert (model(**batch(), adapter_names=names).logits == true).all()
        assert (model(**batch()).logits - plain).abs().max() < 1e-10
    assert flexpatch.savings(model).folded == 1


@parameterized.expand([(eva,), (corda,)])
def test_starts_that_count_tokens(start: Maker) -> None:
    """EVA and CorDA read the layers' inputs, of which rows would hold fewer: such calls run as given."""
    adapters = []
    for base in (bare(), flexpatch.apply(bare())):
        torch.manual_seed(0)
        model = start(base)
        adapters.append({name: p.detach() for name, p in model.named_parameters() if "lora_" in name})
    assert flexpatch.savings(model).folded == 0
    stock, patched = adapters
    assert all((stock[name] == patched[name]).all() for name in stock)
    model(**batch())
    assert flexpatch.savings(model).folded == 1


@pytest.mark.skipif("LORA init lora_ga" not in EXACT, reason="needs a peft that has LoRA-GA: 0.19 or newer")
def test_lora_ga_on_a_patched_model() -> None:
    """It starts from a gradient, which is the same, and so the sizes of its directions are."""
    products = []
    for base in (bare(), flexpatch.apply(bare())):
        torch.manual_seed(0)
        layers = [layer for layer in lora_ga(base).modules() if isinstance(layer, LoraLayer)]
        products.append([layer.lora_A["default"].weight.T @ layer.lora_A["default"].weight for layer in layers])
    assert flexpatch.savings(base).folded == 1
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*products, strict=True))


def test_peft_is_not_needed() -> None:
    assert "import peft" not in Path(tuners.__file__).read_text(encoding="utf-8")
    tuners.check_tuners(bare())


def test_the_table_names_every_tuner() -> None:
    table = tuner_table().splitlines()
    assert len(table) == 3 + len(tuners.EXACT | tuners.REFUSED.keys()) + len(
        tuners.EXACT_VARIANTS | tuners.REFUSED_VARIANTS.keys()
    )
    assert any(re.fullmatch(r"\| LILY \| refused \| averages its router .* \|", line) for line in table)
    assert "| LORA | exact |  |" in table
