"""Trees as TRL's DPOTrainer would cut them."""

from typing import Any

from flexpatch import Tree
from helpers.forests import runs


def same(a: Tree, b: Tree) -> bool:
    return [list(x.ids) for x, _, _ in runs(a)] == [list(y.ids) for y, _, _ in runs(b)]


def trl(tokenizer: Any, row: dict[str, Any]) -> Tree:
    """What DPOTrainer of TRL 1.x makes of a row with a prompt."""
    row = dict(row)

    def encode(text: Any, **options: bool) -> list[int]:
        if isinstance(text, str):
            return tokenizer(text)["input_ids"]
        return tokenizer.apply_chat_template(text, return_dict=True, **options)["input_ids"]

    def common(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    for name in ("chosen", "rejected"):
        if isinstance(row[name], str) and not row[name].endswith(tokenizer.eos_token):
            row[name] += tokenizer.eos_token
    prompt = encode(row["prompt"], add_generation_prompt=True)
    chosen = encode(row["prompt"] + row["chosen"])
    rejected = encode(row["prompt"] + row["rejected"])
    stop = min(common(prompt, chosen), common(prompt, rejected))
    return Tree.of(prompt[:stop], chosen[stop:], rejected[stop:])
