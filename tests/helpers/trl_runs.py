"""Short trainings by TRL's DPOTrainer and by PackedDPOTrainer, on pairs that are tokenised already."""

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.optim import SGD
from trl import DPOConfig, DPOTrainer

import flexpatch
from flexpatch.models import TINY, tiny_model
from flexpatch.trl import PackedDPOTrainer
from helpers.tokenizers_offline import make_tokenizer

PAIRS = 23


def rows(n: int = PAIRS) -> datasets.Dataset:
    """Tokenised pairs of very different lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(5, TINY["vocab_size"], (length,), generator=generator).tolist()

    return datasets.Dataset.from_list(
        [dict(prompt_ids=ids(60), chosen_ids=ids(30), rejected_ids=ids(30)) for _ in range(n)]
    )


class Unprepared:
    """The rows are tokenised already; everything else is the stock trainer."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


def unweighted(packed: type, stock: type) -> type:
    """A packed trainer whose micro-batches weigh alike, as those of a stock trainer do: a control."""

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return stock.compute_loss(self, model, inputs)  # type: ignore[attr-defined]

    return type("Unweighted", (packed,), dict(compute_loss=compute_loss))


class Stock(Unprepared, DPOTrainer):
    pass


class Packed(Unprepared, PackedDPOTrainer):
    pass


def train(
    kind: Any, folder: Path, model: nn.Module | None = None, settings: Any = None, pairs: int = PAIRS, **arguments: Any
) -> Any:
    model = flexpatch.apply(tiny_model("llama")) if model is None else model
    config = dict(
        output_dir=str(folder), report_to="none", max_length=None, logging_steps=1, lr_scheduler_type="constant",
        save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, max_grad_norm=0.0, learning_rate=0.1,
        gradient_checkpointing=False,
    ) | (settings or {})  # fmt: skip
    trainer = kind(
        model,
        args=DPOConfig(**config),
        processing_class=make_tokenizer(),
        **dict(
            train_dataset=rows(pairs),
            ref_model=flexpatch.apply(tiny_model("llama", 1)),
            optimizers=(SGD(model.parameters(), lr=config["learning_rate"]), None),
        )
        | arguments,
    )
    trainer.train()
    return trainer


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
