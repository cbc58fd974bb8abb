"""Log-probs and gradients of a model sharded by FSDP2; rank 0 saves them.

Run by test_logprobs.py, in tests/programs: torchrun --nproc_per_node 2 cpu_ranks.py sharded_ranks.py FOLDER
"""

import sys
from pathlib import Path

import torch
from helpers.oracle import trees
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import flexpatch
from flexpatch.models import tiny_model


def run(model: nn.Module) -> tuple[torch.Tensor, float]:
    """Token log-probs, and the sum of squares of all gradients, each weighed by its parameter's number."""
    rows = flexpatch.build_rows([trees()])
    logps = flexpatch.answer_logprobs(model, rows, chunk_tokens=20)
    flexpatch.dpo_loss(logps.answers[: len(logps.answers) // 2 * 2]).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    full = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return logps.tokens.detach(), sum(float(g.square().sum()) * (i + 1) for i, g in enumerate(full))


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    for frozen in (False, True):
        for alone in (False, True):
            kind = f"{'frozen ' if frozen else ''}head {'alone' if alone else 'in root'}"
            model = flexpatch.apply(tiny_model("llama"))
            model.lm_head.requires_grad_(not frozen)
            _, whole = run(model)
            model.zero_grad()
            # Ranks score different numbers of tokens.
            uneven = flexpatch.build_rows([trees()[: 2 + 5 * distributed.get_rank()]])
            expected = flexpatch.answer_logprobs(model, uneven).tokens
            for layer in model.model.layers:
                fully_shard(layer)
            if alone:
                fully_shard(model.lm_head)
            result = run(fully_shard(model))
            model.zero_grad()
            tokens = flexpatch.answer_logprobs(model, uneven, chunk_tokens=20).tokens
            assert (tokens - expected).abs().max() < 1e-10
            tokens.sum().backward()
            if distributed.get_rank() == 0:
                torch.save(result, folder / f"{kind}.pt")
                torch.save(whole, folder / f"{kind} whole.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
