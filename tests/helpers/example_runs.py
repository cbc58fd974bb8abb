"""A small random model and a few rows, for the examples."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch
from flexpatch.models import TINY
from helpers.processes import ROOT
from helpers.tokenizers_offline import make_tokenizer

DATA = ROOT / "examples" / "data" / "direct_answers.jsonl"


def small_run(folder: Path) -> tuple[str, ...]:
    """Arguments of the examples: a model, and rows cut so that prompts are longer than answers."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Wide and shallow: without FlexAttention a narrow model's long rows are not worth folding.
    sizes = dict(hidden_size=128, num_hidden_layers=2, max_position_embeddings=2048, initializer_range=0.1)
    config = AutoConfig.for_model("llama", **{**TINY, **sizes, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rows = [row for row in flexpatch.read_jsonl(DATA) if len(row["prompt"][0]["content"]) > 120][:8]
    for n, row in enumerate(rows):
        for key, length in dict(prompt=100 + 3 * n, chosen=20 + 3 * n, rejected=46 - 3 * n).items():
            row[key][0]["content"] = row[key][0]["content"][:length]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return "--model", str(folder), "--data", str(data)
