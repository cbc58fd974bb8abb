"""Reference log-probs: the base model's own, in the samples' order, cached for exactly what they depend on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.processes import PATH, PROGRAMS
from helpers.references import LAYOUTS, TREES, model
from parameterized import parameterized
from safetensors.torch import save
from torch import Tensor, nn

import flexpatch
from flexpatch import FlexpatchError, Tree, lay_out, reference, reference_logprobs, separate_logprobs
from flexpatch.models import tiny_model
from flexpatch.tree import Layout


def with_lora(base: nn.Module, **settings) -> nn.Module:
    """LoRA whose B is not zero, as after some training."""
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, **settings))
    change_lora(lora, seed=0)
    return lora


def change_lora(lora: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)


def separate(base: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        answers = separate_logprobs(base, TREES).answers
    return list(answers.float().split([len(tree.children) for tree in TREES]))


def close(a: list[Tensor], b: list[Tensor], atol: float = 1e-6) -> bool:
    return all(torch.allclose(x, y, rtol=1e-6, atol=atol) for x, y in zip(a, b, strict=True))


@parameterized.expand([40, 60, 1000])
def test_it_is_the_base_model(capacity: int) -> None:
    expected = separate(model())
    assert [len(value) for value in expected] == [1, 3, 2, 2]
    values = reference_logprobs(model(), LAYOUTS, capacity=capacity)
    assert close(values, expected)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in values)
    assert not close([values[3], values[2]], [expected[2], expected[3]], atol=1e-1)  # another order is noticed


def test_trees_and_layouts_mix(tmp_path: Path) -> None:
    expected = reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)
    found = reference_logprobs(model(), [*TREES[:2], *LAYOUTS[2:]], capacity=60)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    reference_logprobs(model(), TREES, capacity=60, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # trees and their layouts are the same samples
    with pytest.raises(FlexpatchError, match=r"^sample 1: answer 0 is empty"):
        reference_logprobs(model(), [LAYOUTS[0], Tree.of([5], [])], capacity=60)


def test_float32() -> None:
    assert close(reference_logprobs(model(torch.float32), LAYOUTS, capacity=60), separate(model()), atol=1e-3)


def test_lora_is_off_and_then_on_again() -> None:
    lora = with_lora(model()).eval()
    expected = separate(model())
    trainable = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    with_adapter = separate(lora)
    assert not close(with_adapter, expected, atol=1e-2)
    lora.train()  # with dropout, which the reference must not have
    assert close(reference_logprobs(lora, LAYOUTS, capacity=60), expected)
    assert lora.training
    lora.eval()
    assert close(separate(lora), with_adapter)
    assert trainable == [name for name, parameter in lora.named_parameters() if parameter.requires_grad]


@parameterized.expand([(True,), (False,)])
def test_the_mode_is_restored(training: bool) -> None:
    base = model().train(training)
    frozen = base.get_submodule("model.layers.0").eval()
    reference_logprobs(base, LAYOUTS, capacity=60)
    assert base.training == training and not frozen.training
    with pytest.raises(FlexpatchError, match=r"tokens, outside 1 to 30 \(the budget of one row\)"):
        reference_logprobs(base, LAYOUTS, capacity=30)
    assert base.training == training and not frozen.training


def unusable(*args, **kwargs):
    raise AssertionError("the model ran")


def test_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model()
    first = reference_logprobs(base, LAYOUTS, capacity=60, cache_dir=tmp_path / "new" / "folder")
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(base, "forward", unusable)
    with pytest.raises(AssertionError, match="the model ran"):
        reference_logprobs(base, LAYOUTS, capacity=60)
    cached = reference_logprobs(base, LAYOUTS, capacity=60, cache_dir=tmp_path / "new" / "folder")
    assert [value.tolist() for value in cached] == [value.tolist() for value in first]


def one_weight(base: nn.Module) -> nn.Module:
    with torch.no_grad():
        base.get_submodule("model.norm").weight[3] += 1e-3
    return base


def eager(base: nn.Module) -> nn.Module:
    base.set_attn_implementation("flexpatch_eager")
    return base


def other_rope(base: nn.Module) -> nn.Module:
    base.config.rope_parameters = dict(base.config.rope_parameters, rope_theta=5000.0)
    return base


@parameterized.expand(
    [
        ("weights", lambda: one_weight(model()), LAYOUTS),
        ("another seed", lambda: model(seed=1), LAYOUTS),
        ("settings", lambda: other_rope(model()), LAYOUTS),
        ("dtype", lambda: model(torch.float32), LAYOUTS),
        ("backend", lambda: model(backend="dense"), LAYOUTS),
        ("attention", lambda: eager(model()), LAYOUTS),
        ("fewer samples", model, LAYOUTS[:-1]),
        ("other order", model, LAYOUTS[::-1]),
        ("another id", model, [lay_out(Tree.of([5, 7], [7])), *LAYOUTS[1:]]),
        ("another target", model, [lay_out(Tree.of([5, 6], [8])), *LAYOUTS[1:]]),
        ("a token moved to the prompt", model, [*LAYOUTS[:3], lay_out(Tree([20], [Tree([21], [Tree([22])])]))]),
    ]
)
def test_the_cache_is_not_used_for_other(_name: str, changed: Callable[[], nn.Module], layouts: list[Layout]) -> None:
    assert key(changed(), layouts) != key(model(), LAYOUTS)
    assert key(changed(), layouts) == key(changed(), layouts)


def key(base: nn.Module, layouts: list[Layout] = LAYOUTS) -> str:
    return reference._key(base, layouts)


def test_the_key_tells_which_branch_is_scored() -> None:
    one, other = (Tree([1], [Tree([2], answer=first), Tree([3], answer=not first)]) for first in (True, False))
    assert key(model(), [lay_out(one)]) != key(model(), [lay_out(other)])


def test_a_new_key_computes_anew(tmp_path: Path) -> None:
    first = reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)
    second = reference_logprobs(model(seed=1), LAYOUTS, capacity=60, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert not close(first, second)
    assert close(second, separate(model(seed=1)))


@parameterized.expand(
    [
        ("lora", {}),
        ("replaced modules", dict(modules_to_save=["lm_head"])),
        ("dora", dict(use_dora=True)),
    ]
)
def test_training_lora_keeps_the_key(_name: str, settings: dict[str, object]) -> None:
    before = key(model())
    lora = with_lora(model(), **settings)
    assert key(lora) == before
    change_lora(lora, seed=1)
    for name, parameter in lora.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    assert key(lora) == before
    assert key(flexpatch.apply(with_lora(tiny_model("llama"), **settings), shared_dropout=True)) == before
    one_weight(lora.get_base_model())
    assert key(lora) != before


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[:-4],
        lambda content: b"",
        lambda content: b"x" * len(content),
        lambda content: save({"logprobs": torch.zeros(3)}),
        lambda content: save({"values": torch.zeros(8)}),
        lambda content: content[:-2] + bytes([content[-2] ^ 1, content[-1]]),  # one bit of a value
        lambda content: save({"logprobs": torch.zeros(8)}),
    ],
)
def test_a_damaged_cache_is_named(tmp_path: Path, damaged: Callable[[bytes], bytes]) -> None:
    reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damaged(file.read_bytes()))
    with pytest.raises(FlexpatchError, match=rf"{file.name} cannot be used \(.*\); delete it"):
        reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)


def test_nan_weights_name_the_sample(tmp_path: Path) -> None:
    base = model()
    with torch.no_grad():
        base.get_input_embeddings().weight[20] = torch.nan  # in samples 1 and 3
    with pytest.raises(FlexpatchError, match=r"^sample [13]: the reference model gives \[.*nan.*check its weights"):
        reference_logprobs(base, LAYOUTS, capacity=60, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    assert reference_logprobs(base, LAYOUTS[:1], capacity=60)


def test_samples_are_named_by_their_place_in_the_data() -> None:
    with pytest.raises(FlexpatchError, match=r"^sample 1 has 32 tokens, outside 1 to 30"):
        reference_logprobs(model(), LAYOUTS, capacity=30)
    outside = [lay_out(Tree.of([5], [151])), *LAYOUTS]  # packed last, because it is the shortest
    with pytest.raises(FlexpatchError, match=r"^sample 0: id 151 is outside the vocabulary of 151"):
        reference_logprobs(model(), outside, capacity=60)


def test_no_samples(tmp_path: Path) -> None:
    assert reference_logprobs(model(), [], capacity=60, cache_dir=tmp_path) == []


def test_killed_while_writing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "killed_writer.py")],
        env={**os.environ, "PYTHONPATH": PATH}, cwd=tmp_path, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".partial" and left.stat().st_size > 0
    expected = reference_logprobs(model(), LAYOUTS, capacity=60)
    for _ in range(2):  # computed, then read
        values = reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)
        assert [value.tolist() for value in values] == [value.tolist() for value in expected]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_two_ranks_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file, writers = reference.save_file, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        save_file(*args, **kwargs)
        if not writers:  # another rank begins and ends before this one is done
            writers.append(1)
            reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)

    monkeypatch.setattr(reference, "save_file", interrupted)
    first = reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)
    again = reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=tmp_path)
    assert writers and [value.tolist() for value in first] == [value.tolist() for value in again]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
