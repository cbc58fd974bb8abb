"""Adapters of peft for ``test_tuners.py``: one of every tuner, variant, start and option, by what is said of it."""

import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora.config import ArrowConfig, CordaConfig
from torch import nn

import flexpatch
from flexpatch import Tree
from flexpatch.internals import eager_experts
from flexpatch.models import TINY, tiny_model
from helpers.oracle import random_ids

Maker = Callable[[nn.Module], nn.Module]

PROMPT, *RUNS = random_ids(18, 9, 5, 7, 11, 4, 13)
TREES = [Tree.of(PROMPT, *RUNS[:3]), Tree.of(RUNS[3], *RUNS[4:])]
SEEN = [PROMPT[0], PROMPT[5], RUNS[0][0], RUNS[4][2]]  # tokens that occur


@dataclasses.dataclass
class Of:
    """Makes a model with the adapters of one of peft's configurations.

    Attributes:
        config: Name of its class.
        settings: Its arguments; an :class:`Of` among them is another configuration.
    """

    config: str
    settings: dict[str, Any]

    def __call__(self, base: nn.Module) -> nn.Module:
        return peft.get_peft_model(base, self.made())

    def made(self) -> Any:
        given = {name: value.made() if isinstance(value, Of) else value for name, value in self.settings.items()}
        return self.kind()(**copy.deepcopy(given))

    def kind(self) -> Any:
        return getattr(peft, self.config, None) or getattr(lora_configs, self.config, None)

    def exists(self) -> bool:
        """Whether the installed peft has it: older ones lack some settings, and some of their values."""
        kind = self.kind()
        types = {} if kind is None else {field.name: str(field.type) for field in dataclasses.fields(kind)}
        start = str(self.settings.get("init_lora_weights", True)).split("_niter_")[0]
        named = start in ("True", "False") or start in types.get("init_lora_weights", "")
        inner = all(value.exists() for value in self.settings.values() if isinstance(value, Of))
        return self.settings.keys() <= types.keys() and inner and named


def of(config: str, **settings: Any) -> Of:
    given = dict(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") | settings
    if given["target_modules"] is None:
        del given["target_modules"]
    return Of(config, given)


def lora(**settings: Any) -> Of:
    return of("LoraConfig", **dict(r=4) | settings)


def batch() -> dict[str, torch.Tensor]:
    """Three sequences that share their first half."""
    ids = torch.tensor([PROMPT[:9] + run[:4] for run in RUNS[:3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def eva(base: nn.Module) -> nn.Module:
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
    )
    model = peft.get_peft_model(base, settings)
    peft.initialize_lora_eva_weights(model, [batch()] * 8, show_progress_bar=False)
    return model


def corda(base: nn.Module) -> nn.Module:
    with mock.patch.dict(sys.modules, {"attr": dataclasses}):  # peft takes its dataclass from attrs
        from peft.tuners.lora.corda import preprocess_corda

    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")
    )

    def run() -> None:
        for row in batch()["input_ids"]:
            base(row[None])

    preprocess_corda(base, settings, run_model=run)
    return peft.get_peft_model(base, settings)


def lora_ga(base: nn.Module) -> nn.Module:
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(base, settings, lambda: base(**batch(), labels=batch()["input_ids"]).loss.backward())
    return peft.get_peft_model(base, settings)


def adamss(base: nn.Module, **settings: Any) -> nn.Module:
    """AdaMSS groups singular vectors by scikit-learn, which is not needed to see what its layers do."""
    sklearn, cluster = types.ModuleType("sklearn"), types.ModuleType("sklearn.cluster")

    class KMeans:
        def __init__(self, n_clusters: int, **_: Any) -> None:
            self.clusters = n_clusters

        def fit_predict(self, vectors: np.ndarray) -> np.ndarray:
            return np.arange(len(vectors)) % self.clusters

    cluster.KMeans = KMeans  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"sklearn": sklearn, "sklearn.cluster": cluster}):
        model = of("AdamssConfig", r=8, num_subspaces=2, **settings)(base)
    for layer in model.modules():
        if "adamss_A" in layer._modules:
            layer.dtype = torch.float64
    return model


def two(base: nn.Module) -> nn.Module:
    """Two adapters, both active."""
    model = lora()(base)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    return model


def mixed(base: nn.Module) -> nn.Module:
    """Adapters of two tuners, both active."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(r=4, target_modules=["down_proj"]))
    model.set_adapter(["default", "second"])
    return model


def arrow(base: nn.Module) -> nn.Module:
    """Two adapters, between which a router chooses for each token."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="task_0")
    model.add_adapter("task_1", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    settings = ArrowConfig(top_k=1, rng_seed=3)
    settings.task_adapter_names = ["task_0", "task_1"]
    router = peft.LoraConfig(r=4, target_modules=["q_proj"], arrow_config=settings)
    model.add_adapter("arrow_router", router)
    model.set_adapter("arrow_router")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("task_" in name)
    return model


def injected(base: nn.Module) -> nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), base)


def added(base: nn.Module) -> nn.Module:
    """By transformers' own ``add_adapter``."""
    with mock.patch("transformers.integrations.peft.check_peft_version"):  # some releases ask for a peft of the future
        base.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    return base


ONE = dict(target_modules=["q_proj"])
VIRTUAL = dict(num_virtual_tokens=4, target_modules=None)

# Proven. A kind's name begins with peft's name of its tuner.
EXACT: dict[str, Maker] = {
    "ADALORA": of("AdaLoraConfig", init_r=4, total_step=10),
    "ADAMSS": adamss,
    "ADAMSS dynamic": lambda base: adamss(base, use_dynamic_rank=True, use_asa=True),
    "ADAPTION_PROMPT": of("AdaptionPromptConfig", adapter_len=4, adapter_layers=2, target_modules=None),
    "BEFT": of("BeftConfig"),
    "BOFT": of("BOFTConfig"),
    "BOFT butterfly": of("BOFTConfig", boft_n_butterfly_factor=2, bias="all"),
    "BONE": of("BoneConfig", r=4),  # MISS, by its name in peft before 0.19
    "BONE bat": of("BoneConfig", r=4, init_weights="bat", **ONE),
    "C3A": of("C3AConfig", block_size=16),
    "DEFT": of("DeftConfig", r=4),
    "DEFT qr": of("DeftConfig", r=4, decomposition_method="qr", alpha=8),
    "DEFT para": of("DeftConfig", r=4, para=True),
    "DELORA": of("DeloraConfig", r=4, delora_lambda=2),
    "FOURIERFT": of("FourierFTConfig", n_frequency=20, scaling=20.0),
    "FROD": of("FrodConfig", progressbar=False, **ONE),
    "GLORA": of("GloraConfig", r=4),
    "GLORA vector": of("GloraConfig", config_A_B="vector", config_C="vector", config_D_E="vector"),
    "GLORA constant": of("GloraConfig", config_A_B="constant", config_C="none", config_D_E="none"),
    "GRALORA": of("GraloraConfig", r=4, alpha=4),
    "GRALORA hybrid": of("GraloraConfig", r=4, hybrid_r=2, alpha=4),
    "HIRA": of("HiraConfig", r=4),
    "HIRA embeddings": of("HiraConfig", r=4, target_modules=["embed_tokens"]),
    "HRA": of("HRAConfig", r=4),
    "HRA GS": of("HRAConfig", r=4, apply_GS=True),
    "IA3": of("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": of("LNTuningConfig", target_modules=None),
    "LOHA": of("LoHaConfig"),
    "LOKR": of("LoKrConfig"),
    "LOKR both": of("LoKrConfig", decompose_both=True, decompose_factor=4),
    "LORA": lora(target_modules="all-linear"),
    "LORA rslora": lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}),
    "LORA bias": lora(lora_bias=True, bias="all"),
    "LORA embeddings and head": lora(target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"]),
    "LORA modules_to_save": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LORA norms": lora(modules_to_save=["input_layernorm", "norm"]),
    "LORA tokens": lora(trainable_token_indices={"embed_tokens": SEEN}),
    "LORA layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "LORA target_parameters": lora(target_parameters=["self_attn.k_proj.weight"]),
    "LORA dora": lora(use_dora=True),
    "LORA dora embeddings and head": lora(
        use_dora=True, target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"]
    ),
    "LORA qalora": lora(use_qalora=True),
    "LORA bdlora": lora(
        use_bdlora=Of(
            "BdLoraConfig", dict(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
        )
    ),
    "LORA kasa": lora(kasa_config=Of("KasaConfig", {})),
    "LORA velora random": lora(velora_config=Of("VeloraConfig", dict(num_groups=4, init_type="random"))),
    "LORA arrow": arrow,
    **{f"LORA init {start}": lora(init_lora_weights=start) for start in (False, "gaussian", "olora", "orthogonal")},
    **{f"LORA init {start}": lora(init_lora_weights=start) for start in ("pissa", "pissa_niter_2", "mica")},
    "LORA mica embeddings": lora(init_lora_weights="mica", target_modules=["embed_tokens", "q_proj"]),
    "LORA init eva": eva,
    "LORA init corda": corda,
    "LORA init lora_ga": lora_ga,
    "LORA two adapters": two,
    "LORA and LOHA mixed": mixed,
    "LORA injected": injected,
    "LORA added by transformers": added,
    "MISS": of("MissConfig", r=4),
    "MISS bat": of("MissConfig", r=4, init_weights="bat", **ONE),
    "MISS mini": of("MissConfig", r=4, mini_r=4, init_weights="mini", **ONE),
    "OFT": of("OFTConfig", oft_block_size=8),
    "OFT cayley": of("OFTConfig", oft_block_size=8, use_cayley_neumann=False, block_share=True),
    "OFT coft": of("OFTConfig", oft_block_size=8, coft=True, eps=1e-2),
    "OFT embeddings": of("OFTConfig", oft_block_size=8, target_modules=["embed_tokens"]),
    "OSF": of("OSFConfig", effective_rank=8),
    "PEANUT": of("PeanutConfig", r=4, depth=1),
    "PSOFT": of("PsoftConfig", r=4),
    "PSOFT pissa": of("PsoftConfig", r=4, ab_svd_init="pissa_init", psoft_svd="lowrank", use_cayley_neumann=True),
    "PSOFT free": of("PsoftConfig", r=4, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False),
    "RANDLORA": of("RandLoraConfig", r=4, randlora_alpha=4),
    "RANDLORA sparse": of("RandLoraConfig", r=4, randlora_alpha=4, sparse=True),
    "ROAD": of("RoadConfig", group_size=4),
    "ROAD 2": of("RoadConfig", group_size=4, variant="road_2"),
    "ROAD 4": of("RoadConfig", group_size=4, variant="road_4"),
    "SHIRA": of("ShiraConfig", r=4),
    "SUPERTUNING": of("SupertuningConfig"),
    "SUPERTUNING supra": of("SupertuningConfig", r=4, select_top=False),
    "TINYLORA": of("TinyLoraConfig", weight_tying=0.5),
    "TINYLORA embeddings": of("TinyLoraConfig", target_modules=["embed_tokens", "q_proj"]),
    "TRAINABLE_TOKENS": of("TrainableTokensConfig", token_indices=SEEN, target_modules=["embed_tokens"]),
    "UNILORA": of("UniLoraConfig"),
    "VBLORA": of("VBLoRAConfig", vector_length=16, num_vectors=8, **ONE),
    "VERA": of("VeraConfig", r=4, **ONE),
    "WAVEFT": of("WaveFTConfig", n_frequency=20, scaling=2.0),
    "WAVEFT plain": of("WaveFTConfig", n_frequency=20, scaling=2.0, use_idwt=False, proportional_parameters=True),
}

# Refused, each with a part of the reason.
REFUSED: dict[str, tuple[Maker, str]] = {
    "CARTRIDGE": (of("CartridgeConfig", **VIRTUAL), "tokens of its own"),
    "CPT": (
        of("CPTConfig", cpt_token_ids=[4, 5], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], target_modules=None),
        "tokens of its own",
    ),
    "LILY": (of("LilyConfig", r=4, **ONE), "averages its router"),
    "MULTITASK_PROMPT_TUNING": (of("MultitaskPromptTuningConfig", num_tasks=2, **VIRTUAL), "tokens of its own"),
    "POLY": (of("PolyConfig", n_tasks=2), "a task for each sequence"),
    "PREFIX_TUNING": (of("PrefixTuningConfig", **VIRTUAL), "tokens of its own"),
    "PROMPT_TUNING": (of("PromptTuningConfig", **VIRTUAL), "tokens of its own"),
    "PVERA": (of("PveraConfig", r=4, **ONE), "draws noise for each token"),
    "P_TUNING": (of("PromptEncoderConfig", encoder_hidden_size=16, **VIRTUAL), "tokens of its own"),
    "SHADOW": (of("ShadowConfig", shadow_dropout=0.0, target_modules=None), "runs a second model"),
    "LORA aLoRA": (lora(alora_invocation_tokens=[PROMPT[3]]), "invocation tokens"),
    "LORA Monteclora": (
        lora(monteclora_config=Of("MontecloraConfig", dict(sample_scaler=0.1, buffer_size=4))),
        "draws noise",
    ),
    "LORA Velora": (lora(velora_config=Of("VeloraConfig", dict(num_groups=4))), "init_type='random'"),
    "LORA once Velora": (
        lora(velora_config=Of("VeloraConfig", dict(num_groups=4, init_type="batch_average_once"))),
        "init_type='random'",
    ),
}


KNOWN = {peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}


def exists(kind: str, maker: Maker) -> bool:
    """Whether the installed peft has a kind: its tuner, and all settings of it."""
    if maker is lora_ga:
        return hasattr(peft, "LoraGAConfig")  # from peft 0.19 on
    return kind.split()[0] in KNOWN and (not isinstance(maker, Of) or maker.exists())


EXACT = {kind: maker for kind, maker in EXACT.items() if exists(kind, maker)}
REFUSED = {kind: refused for kind, refused in REFUSED.items() if exists(kind, refused[0])}


@cache
def _bare() -> nn.Module:
    with mock.patch("flexpatch.models.TINY", TINY | {"num_hidden_layers": 2}):
        model = tiny_model("llama", dtype=torch.float32)
    model.config.use_cache = False
    return model


def bare() -> nn.Module:
    """A new tiny model of two layers, in float32: some adapters cannot be made in float64."""
    return copy.deepcopy(_bare())


def lifted(model: nn.Module, training: bool = False) -> nn.Module:
    """In float64, with adapters that matter: most begin as if not there."""
    model = eager_experts(model.double()).train(training)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def adapted(maker: Maker, training: bool = False, patched_before: bool = False) -> nn.Module:
    """A new model with the adapters of a kind, the same at every call."""
    torch.manual_seed(0)
    base = bare()
    return lifted(maker(flexpatch.apply(base) if patched_before else base), training)
