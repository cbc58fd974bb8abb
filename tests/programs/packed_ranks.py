"""One packed epoch as one optimizer step, on as many ranks as torchrun starts; rank 0 saves the weights.

Run by test_trl.py, in tests/programs: torchrun --nproc_per_node 2 cpu_ranks.py packed_ranks.py FILE
"""

import os
import sys
from pathlib import Path

import torch
from helpers.trl_runs import Packed, train, weights
from torch import Tensor


def step(folder: Path) -> tuple[Tensor, int, int]:
    """The weights after the step, the number of ranks, and the number of bins."""
    settings = dict(gradient_accumulation_steps=100, num_train_epochs=1)
    trainer = train(Packed, folder, settings=settings, pairs=24, token_budget=200)
    assert trainer.state.global_step == 1
    return weights(trainer.model), trainer.accelerator.num_processes, len(trainer.bins)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    result = step(file.parent)
    if int(os.environ["RANK"]) == 0:
        torch.save(result, file)
