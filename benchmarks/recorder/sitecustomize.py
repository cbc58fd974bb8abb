"""Notes the loss of each step and the weights at the end of a ``transformers.Trainer`` or verl's engine.

frameworks.py puts this folder on ``PYTHONPATH``, so that Python runs this file when it starts. ``RECORD`` names the
folder of the notes. Stock and patched runs both have it. Adapters start from a fixed seed, since not every program
seeds them.
"""

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

from flexpatch.autopatch import when_imported

FOLDER = Path(os.environ["RECORD"])


def write(model: Any, losses: list[float]) -> None:
    """Write all that was noted: the trained weights, and the losses so far."""
    from safetensors.torch import save_file

    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    trained = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).float().cpu() for n, p in trained.items()}
    save_file({n: p.clone() for n, p in trained.items()}, FOLDER / "weights.safetensors")
    (FOLDER / "losses.json").write_text(json.dumps(losses))


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
        result = train(self, *args, **kwargs)
        write(self.model, losses)
        return result

    module.Trainer.training_step, module.Trainer.train = noted_step, noted_train


def record_engine(module: Any) -> None:
    """Let verl's engines write the two files after each step."""
    step = module.BaseEngine.train_batch
    losses: list[float] = []

    @wraps(step)
    def noted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(self, *args, **kwargs)
        losses.append(sum(float(loss) for loss in output["loss"]))
        write(self.module, losses)
        return output

    module.BaseEngine.train_batch = noted_step


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
when_imported("verl.workers.engine.base", record_engine)
when_imported("peft.mapping_func", seed_adapters)
