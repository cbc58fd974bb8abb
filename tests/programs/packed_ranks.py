"""One packed epoch as one optimizer step, on as many ranks as torchrun starts; rank 0 saves the weights.

Run by test_trl.py, in tests/programs: torchrun --nproc_per_node 2 cpu_ranks.py packed_ranks.py FILE
"""

import sys
from pathlib import Path

import torch
from helpers.trl_runs import Packed, train, weights

if __name__ == "__main__":
    file = Path(sys.argv[1])
    settings = dict(gradient_accumulation_steps=100, num_train_epochs=1)
    trainer = train(Packed, file.parent, settings=settings, pairs=24, token_budget=200)
    assert trainer.state.global_step == 1
    if trainer.accelerator.is_main_process:
        torch.save([weights(trainer.model), trainer.accelerator.num_processes, len(trainer.bins)], file)
