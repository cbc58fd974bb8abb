"""The line of each framework's configuration folds as ``flexpatch.apply`` does, against stand-ins of their interfaces.

``benchmarks/frameworks.py`` runs the real programs. Both read the savings from what a program prints.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import frameworks as stand_ins
from helpers.processes import start_python
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_runs import Stock, rows, weights
from torch.optim import SGD
from transformers import TrainerCallback
from trl import DPOConfig

import flexpatch
from benchmarks import frameworks
from flexpatch import FlexpatchError, UnsupportedModelError
from flexpatch.callbacks import Flexpatch
from flexpatch.models import tiny_model

PLUGIN = "flexpatch.integrations.axolotl.Plugin"


def trainer(folder: Path, model: Any = None, **arguments: Any) -> Any:
    """A DPO trainer with a reference of its own, neither of which is patched."""
    model = model or tiny_model("llama")
    config = DPOConfig(
        output_dir=str(folder), report_to="none", max_length=None, logging_steps=1, save_strategy="no", use_cpu=True,
        disable_tqdm=True, bf16=False, max_grad_norm=0.0, learning_rate=0.1, gradient_checkpointing=False, max_steps=2,
    )  # fmt: skip
    return Stock(
        model, ref_model=tiny_model("llama", 1), args=config, train_dataset=rows(16),
        processing_class=make_tokenizer(), optimizers=(SGD(model.parameters(), lr=0.1), None), **arguments,
    )  # fmt: skip


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trained = trainer(tmp_path_factory.mktemp("stock"))
    trained.train()
    return trained


def agrees(ours: Any, stock: Any) -> None:
    """Losses, weights, and what was folded: policy and reference."""
    # TRL makes log-probs in float32, from weights in float64.
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-6) and len(losses(ours)) == 2
    assert (weights(ours.model) - weights(stock.model)).abs().max() < 1e-7
    assert flexpatch.savings(ours.model).folded == flexpatch.savings(ours.ref_model).folded == 2


# The callback ---------------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Remembers the log entries that reporters get."""

    def __init__(self) -> None:
        self.entries: list[dict] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.entries.append(dict(logs))


def test_the_callback_applies_to_all_models(tmp_path: Path, stock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    ours = trainer(tmp_path, callbacks=[reporter, Flexpatch(backend="dense")])
    assert flexpatch.is_applied(ours.model) and not flexpatch.is_applied(ours.ref_model)
    ours.train()
    agrees(ours, stock)
    printed = capsys.readouterr().out
    assert "flexpatch: model: 2 of 2 batches folded" in printed
    assert "flexpatch: ref_model: 2 of 2 batches folded" in printed
    assert frameworks.folded(printed) == (4, 4)
    assert all(entry["flexpatch/token_factor"] > 1.2 for entry in [*reporter.entries, *ours.state.log_history])


def test_the_callback_tells_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: False)
    trainer(tmp_path, callbacks=[Flexpatch()]).train()
    printed = capsys.readouterr().out
    assert "flexpatch: ref_model: 0 of 2 batches folded: 2 with too little to share" in printed
    with pytest.raises(ValueError, match="no batch was folded"):
        frameworks.folded(printed)


def test_the_callback_refuses_when_the_trainer_is_built(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UnsupportedModelError, match=r"dropout 0.1 in .* is active"):
        trainer(tmp_path, model=model, callbacks=[Flexpatch()])
    trainer(tmp_path, model=model, callbacks=[Flexpatch(shared_dropout=True)])


def test_the_callback_needs_its_trainer(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    with pytest.raises(FlexpatchError, match="no trainer of transformers holds this callback"):
        Flexpatch().on_train_begin(ours.args, ours.state, ours.control, model=ours.model)


def test_without_folding_there_are_no_savings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = trainer(tmp_path, callbacks=[Flexpatch(fold=False)])
    ours.train()
    with pytest.raises(ValueError, match="no batch was folded"):
        frameworks.folded(capsys.readouterr().out)


# axolotl --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("pydantic", reason="needs pydantic, which axolotl and new releases of typer bring")
    stand_ins.put(monkeypatch, "axolotl.integrations.base", BasePlugin=stand_ins.BasePlugin)
    return stand_ins.fresh(monkeypatch, "flexpatch.integrations.axolotl")


@pytest.mark.usefixtures("axolotl")
def test_axolotl(tmp_path: Path, stock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dict(plugins=[PLUGIN], flexpatch_backend="dense", flexpatch_shared_dropout=True, rl="dpo")
    ours = stand_ins.axolotl(settings, lambda: trainer(tmp_path))
    assert flexpatch.is_applied(ours.model) and flexpatch.is_applied(ours.ref_model)
    ours.train()
    agrees(ours, stock)
    assert frameworks.folded(capsys.readouterr().out) == (4, 4)


@pytest.mark.usefixtures("axolotl")
def test_axolotl_hands_all_options_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("flexpatch.apply", lambda trainer, **options: given.append(options))
    options = dict(backend="dense", compile=True, recompute_layers="auto", shared_dropout=True)
    settings = {f"flexpatch_{name}": value for name, value in options.items()}
    stand_ins.axolotl(dict(plugins=[PLUGIN]) | settings, lambda: trainer(tmp_path))
    stand_ins.axolotl(dict(plugins=[PLUGIN]), lambda: trainer(tmp_path))
    assert given == [options, {}]


@pytest.mark.usefixtures("axolotl")
def test_axolotl_refuses_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flexpatch_compile"):
        stand_ins.axolotl(dict(plugins=[PLUGIN], flexpatch_compile="perhaps"), lambda: trainer(tmp_path))


def test_a_plugin_that_applies_nothing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = type("Plugin", (stand_ins.BasePlugin,), {})
    stand_ins.put(monkeypatch, "idle", Plugin=plugin)
    ours = stand_ins.axolotl(dict(plugins=["idle.Plugin"]), lambda: trainer(tmp_path))
    ours.train()
    with pytest.raises(ValueError, match="no batch was folded"):
        frameworks.folded(capsys.readouterr().out)


# ms-swift -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def callbacks_map(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    callbacks: dict[str, Any] = {}
    stand_ins.put(monkeypatch, "swift.callbacks", callbacks_map=callbacks)
    with stand_ins.same_path():
        yield callbacks


def test_swift(
    callbacks_map: dict, tmp_path: Path, stock: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = start_python(["-m", "flexpatch.integrations.swift"], tmp_path).stdout.strip()
    stand_ins.import_external_file(printed)
    # Whoever imports a framework must not find flexpatch/integrations.
    assert [path.name for path in Path(sys.path[0]).glob("[!_]*")] == ["flexpatch_plugin.py"]
    monkeypatch.setenv("FLEXPATCH_OPTIONS", "--backend dense --shared-dropout")
    callback = callbacks_map["flexpatch"](None, None)
    assert callback.options == dict(backend="dense", shared_dropout=True)
    ours = trainer(tmp_path, callbacks=[callback])
    ours.train()
    agrees(ours, stock)
    assert frameworks.folded(capsys.readouterr().out) == (4, 4)


# verl -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_remove_padding", [True, False])
def test_verl(use_remove_padding: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    engine = type("FSDPEngine", (stand_ins.FSDPEngine,), {"_build_module": stand_ins.FSDPEngine._build_module})
    ids = torch.cat([torch.arange(100).expand(6, -1), torch.arange(60).view(6, 10)], dim=1)
    mask = torch.ones_like(ids)
    mask[::2, :7] = 0
    true = engine(str(tmp_path), use_remove_padding).logits(ids, mask)
    stand_ins.put(monkeypatch, "verl.workers.engine.fsdp.transformer_impl", FSDPEngine=engine)
    for _ in range(2):  # each worker of a process imports it
        stand_ins.fresh(monkeypatch, "flexpatch.integrations.verl")
    monkeypatch.setenv("FLEXPATCH_OPTIONS", "--backend dense")
    ours = engine(str(tmp_path), use_remove_padding)
    assert (ours.logits(ids, mask) - true).abs().max() < 1e-9
    saved = flexpatch.savings(ours.module)
    assert saved.folded == saved.batches == 1 and saved.factor > 2
    assert not hasattr(engine._build_module.__wrapped__, "__wrapped__")


# All ------------------------------------------------------------------------------------------------------------------


def test_they_are_short() -> None:
    files = sorted(Path(flexpatch.__file__).parent.glob("integrations/**/*.py"))
    assert len(files) == 6
    assert all(len(file.read_text(encoding="utf-8").splitlines()) < 60 for file in files)
