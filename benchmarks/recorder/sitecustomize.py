"""Notes the loss of each step and the weights at the end of any ``transformers.Trainer``, for frameworks.py.

Python runs this file when it starts with this folder on ``PYTHONPATH``. ``RECORD`` names the folder of the notes. Stock
and patched runs both have it. Adapters start from a fixed seed, since not every program seeds them.
"""

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

from flexpatch.autopatch import when_imported

FOLDER = Path(os.environ["RECORD"])


def record(module: Any) -> None:
    """Let all trainers write ``losses.json`` and ``weights.safetensors``."""
    step, train = module.Trainer.training_step, module.Trainer.train
    losses: list[float] = []

    @wraps(step)
    def noted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        losses.append(loss.item())
        return loss

    @wraps(train)
    def noted_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        from safetensors.torch import save_file

        result = train(self, *args, **kwargs)
        weights = {n: p.detach().float().cpu().contiguous() for n, p in self.model.named_parameters()}
        trained = {n: weights[n].clone() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, FOLDER / "weights.safetensors")
        (FOLDER / "losses.json").write_text(json.dumps(losses))
        return result

    module.Trainer.training_step, module.Trainer.train = noted_step, noted_train


def seed_adapters(module: Any) -> None:
    """Let ``get_peft_model`` draw the same adapters in each run."""
    make = module.get_peft_model

    @wraps(make)
    def seeded(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **kwargs)

    module.get_peft_model = seeded


when_imported("transformers.trainer", record)
when_imported("peft.mapping_func", seed_adapters)
