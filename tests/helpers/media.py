"""Batches with images, and what the unpatched model makes of each sequence alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexpatch.fold import predicting_padding
from flexpatch.layouts import Drawn, multimodal_types
from flexpatch.models import tiny_types
from flexpatch.pictures import call_with_images

# Every multimodal class with a record, and one of each layout.
KINDS = [kind for kind in multimodal_types() if kind in tiny_types()]
FAST = [kind for kind in ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "smolvlm", "mistral3") if kind in KINDS]


@dataclass(frozen=True)
class Pictured:
    """Sequences, the images of each in order, and the tokens of its answer, at its end."""

    sequences: list[list[int]]
    images: list[list[Drawn]]
    answers: list[int]

    def only(self, *which: int) -> "Pictured":
        return Pictured(*([each[n] for n in which] for each in (self.sequences, self.images, self.answers)))


def text(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(7, 140, length).tolist()


def copied(image: Drawn) -> Drawn:
    """An equal image in other memory, as a processor makes it."""
    return Drawn({name: tensor.clone() for name, tensor in image.tensors.items()}, list(image.tokens))


def drawn(kind: str, config: Any, numbers: Sequence[int], seed: int = 0) -> list[Drawn]:
    generator = torch.Generator().manual_seed(seed)
    return [multimodal_types()[kind].draw(config, number, generator) for number in numbers]


def awkward(kind: str, config: Any) -> Pictured:
    """One image in two prompts, other pixels under equal text, two images in a prompt, side by side too, no image."""
    rng = np.random.default_rng(0)
    first, second, third, other = drawn(kind, config, (0, 1, 2, 0))
    begin, question, middle, end, alike = (text(rng, length) for length in (2, 6, 4, 7, 3))
    prompts: list[list[Any]] = [
        [begin, first, question],
        [begin, other, question],
        [middle, first, middle, second, end],
        [middle, first, third, end],
        [question, first, begin],
        [question, end],
    ]
    sequences: list[list[int]] = []
    images: list[list[Drawn]] = []
    answers: list[int] = []
    for prompt in prompts:
        ids = [token for part in prompt for token in (part.tokens if isinstance(part, Drawn) else part)]
        for answer in (alike + text(rng, 3), alike + text(rng, 5)):
            sequences.append(ids + answer)
            answers.append(len(answer))
            images.append([copied(part) for part in prompt if isinstance(part, Drawn)])
    order = [*range(0, len(sequences), 2), *range(1, len(sequences), 2)]  # all chosen answers, then all rejected
    return Pictured(sequences, images, answers).only(*order)


def random_pictured(kind: str, config: Any, rng: np.random.Generator) -> Pictured:
    """Prompts of up to three images, in which images, and texts around them, often come again."""
    pool = drawn(kind, config, rng.integers(0, 3, 3).tolist(), int(rng.integers(1 << 30)))
    words = [text(rng, int(rng.integers(1, 6))) for _ in range(3)]
    sequences: list[list[int]] = []
    images: list[list[Drawn]] = []
    answers: list[int] = []
    for _ in range(rng.integers(1, 4)):
        parts: list[Any] = [words[rng.integers(3)]]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            parts.append(pool[rng.integers(3)])
            if rng.random() < 0.6:
                parts.append(words[rng.integers(3)])
        ids = [token for part in parts for token in (part.tokens if isinstance(part, Drawn) else part)]
        own = [part for part in parts if isinstance(part, Drawn)]
        for _ in range(rng.integers(1, 4)):
            answer = words[rng.integers(3)] * int(rng.random() < 0.5) + text(rng, int(rng.integers(0, 6)))
            sequences.append(ids + answer)
            answers.append(len(answer))
            images.append([copied(image) for image in own])
    order = rng.permutation(len(sequences))
    return Pictured(sequences, images, answers).only(*order)


def call_of(kind: str, config: Any, pictured: Pictured, **options: Any) -> dict[str, Any]:
    each = pictured.sequences, pictured.images, pictured.answers
    return call_with_images(multimodal_types()[kind], config, *each, **options)


def logps(model: nn.Module, call: dict[str, Any]) -> Tensor:
    return model(**call).logits.log_softmax(-1)


def separately(kind: str, model: nn.Module, pictured: Pictured) -> list[Tensor]:
    """Log-probs of the unpatched model, which sees each sequence alone and without padding."""
    found = []
    for n in range(len(pictured.sequences)):
        found.append(logps(model, call_of(kind, model.config, pictured.only(n)))[0])
    return found


def read_of(call: dict[str, Any], logps_NSV: Tensor) -> list[Tensor]:
    """What trainers may read of each sequence: its tokens."""
    return [each[mask.bool()] for each, mask in zip(logps_NSV, call["attention_mask"], strict=True)]


def gradients(model: nn.Module, each: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of random sums of log-probs: of the tower with its projector, and of all other weights."""
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in each).backward()  # type: ignore[union-attr]
    tower, others = [], []
    for name, parameter in model.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        (others if any(part in name for part in ("language_model", "text_model", "lm_head")) else tower).append(own)
    return torch.cat([x.flatten() for x in tower]), torch.cat([x.flatten() for x in others])


def apart(ours: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest difference of log-probs."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, true, strict=True))


def with_holes(rng: np.random.Generator, call: dict[str, Any]) -> dict[str, Any]:
    """Take tokens of text out by the mask alone. Where a hole predicts a token its output is read too."""
    mask, ids = call["attention_mask"].numpy().copy(), call["input_ids"].numpy()
    mask[(ids > 6) & (ids < 140) & (rng.random(mask.shape) < 0.1)] = 0
    return call | dict(attention_mask=torch.from_numpy(mask))


def readable(mask: Tensor) -> Tensor:
    """Tokens, and padding behind a token that another token follows."""
    seen = mask.bool().numpy()
    return torch.from_numpy(seen | (predicting_padding(seen) & (np.cumsum(seen, 1) > 0)))
