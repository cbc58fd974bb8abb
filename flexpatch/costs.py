"""FLOPs of a model, and the work of a dataset row in padded, folded and packed batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexpatch.counts import WORTH
from flexpatch.errors import FlexpatchError
from flexpatch.image_costs import KEYS, Shown
from flexpatch.models import load_config
from flexpatch.tree import Layout, Tree, lay_out


class Model(NamedTuple):
    """Sizes of a model that FLOPs depend on.

    Attributes:
        hidden: Width of the hidden states.
        layers: Number of layers.
        ffn: Width of the gated MLP that one token passes; with experts, of all experts that one token is routed to.
        heads: Query heads of a layer.
        kv_heads: Key heads of a layer, and value heads.
        head_size: Width of a head.
        vocabulary: Number of token ids.
    """

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    def flops(self, cost: Cost) -> int:
        """Return the FLOPs of the forward passes that do the work ``cost``, towers included."""
        linear = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads) + 3 * self.hidden * self.ffn
        layer = 2 * linear * cost.tokens + 4 * self.heads * self.head_size * cost.pairs
        return self.layers * layer + 2 * self.hidden * self.vocabulary * cost.logits + cost.tower


ASSUMPTIONS_OF_IMAGES = """
- An image fills as many tokens as the model's processor makes of a grey one of its size. Its tower is counted forward
  and backward, as if it were trained; a preset has none. Images are compared by their files."""

PRESETS = {  # Llama 3's
    "1b": Model(2048, 16, 8192, 32, 8, 64, 128256),
    "3b": Model(3072, 28, 8192, 24, 8, 128, 128256),
    "8b": Model(4096, 32, 14336, 32, 8, 128, 128256),
    "70b": Model(8192, 80, 28672, 64, 8, 128, 128256),
}


class Cost(NamedTuple):
    """Work of some forward passes.

    Attributes:
        tokens: Tokens that pass the layers.
        pairs: Pairs of a query and a key in attention.
        logits: Tokens that pass the output layer.
        images: Images that the vision tower looks at.
        tower: FLOPs of the tower.
    """

    tokens: int
    pairs: int
    logits: int
    images: int = 0
    tower: int = 0

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Add up the work of batches or dataset rows."""
        return cls(*map(sum, zip(*costs, strict=True)))


class Sample(NamedTuple):
    """Lengths, sequences and work of one dataset row.

    Attributes:
        prompt: Tokens of the prompt.
        answers: Tokens of each answer.
        sequences: Ids of each prompt + answer, (length,) int32 arrays.
        shared: Work of the row with its prompt shared, in packed rows.
        unshared: Work of the row as separate sequences, in packed rows without padding.
        shown: Images of the prompt.
    """

    prompt: int
    answers: list[int]
    sequences: list[Any]
    shared: Cost
    unshared: Cost
    shown: Sequence[Shown] = ()

    @classmethod
    def of(cls, layout: Layout, shown: Sequence[Shown] = ()) -> Sample:
        """Read a layout that the collator made: a prompt and its answers.

        Args:
            layout: The layout.
            shown: Images of the prompt, whose tokens have their keys.

        Returns:
            The sample.
        """
        sequences = [layout.ids[path].astype(np.int32) for path in layout.answers]
        lengths, answers = [len(sequence) for sequence in sequences], layout.answer_lengths
        images, tower = len(shown), sum(image.flops for image in shown)
        shared = Cost(len(layout), int((layout.positions + 1).sum()), len(layout.predictors), images, tower)
        pairs, copies = sum(n * (n + 1) // 2 for n in lengths), len(answers)
        unshared = Cost(sum(lengths), pairs, sum(answers), copies * images, copies * tower)
        return cls(lengths[0] - answers[0], answers, sequences, shared, unshared, shown)

    def saved(self) -> float:
        """Return the fraction of the row's tokens that sharing leaves out."""
        return 1 - self.shared.tokens / self.unshared.tokens


def images_of(
    samples: Sequence[Sample], layouts: dict[str, dict[str, float]], lengths: dict[str, list[int]], assumptions: str
) -> dict[str, Any]:
    """Count the images of prompts, and the tower's share of each layout's FLOPs.

    Args:
        samples: Dataset rows.
        layouts: Their work in each layout. Without images the entries of images are taken out.
        lengths: Values whose percentiles are reported. Tokens of images are added.
        assumptions: Of an estimate without images.

    Returns:
        Entries of the result for them; none without images.
    """
    shown = [image for sample in samples for image in sample.shown]
    if not shown:
        for layout in layouts.values():
            del layout["images"], layout["tower"]
        return {}
    lengths["image"] = [image.tokens for image in shown]
    share = {name: layout["tower"] / layout["flops"] for name, layout in layouts.items()}
    distinct = len({image.key for image in shown})
    images = dict(count=len(shown), distinct=distinct, tower_share=share)
    return dict(images=images, assumptions=assumptions + ASSUMPTIONS_OF_IMAGES)


def padded(batch: Sequence[Sample]) -> Cost:
    """Count the work of a batch in a stock trainer: every answer with its prompt, padded to the longest."""
    lengths = [len(sequence) for sample in batch for sequence in sample.sequences]
    N, S = len(lengths), max(lengths)
    images, tower = (sum(getattr(sample.unshared, name) for sample in batch) for name in ("images", "tower"))
    return Cost(N * S, N * S * (S + 1) // 2, N * S, images, tower)


def folded(batch: Sequence[Sample]) -> Cost:
    """Count the work of a batch after :func:`flexpatch.apply`: one row, in which common beginnings are merged."""
    given = padded(batch)
    # A root above all sequences makes one tree of them. The root is not counted, and it shifts positions by one.
    forest = lay_out(Tree.of([0], *(sequence for sample in batch for sequence in sample.sequences)))
    found = {image.key: image for sample in batch for image in sample.shown}
    keys, tokens = np.unique(forest.ids[forest.ids >= KEYS], return_counts=True) if found else ((), ())
    run = [(count // found[key].tokens, found[key].flops) for key, count in zip(map(int, keys), tokens, strict=True)]
    images, tower = sum(int(times) for times, _ in run), sum(int(times) * flops for times, flops in run)
    row = Cost(len(forest) - 1, int(forest.positions.sum()), given.logits, images, tower)
    return row if row.tokens <= WORTH * given.tokens else given


def model_of(name: str, *, trust_remote_code: bool = False) -> Model:
    """Look up the sizes of a preset, or read them from a model's configuration. No weights are read.

    Args:
        name: A key of ``PRESETS``, a hub name, a local directory or a GGUF file.
        trust_remote_code: Run code that comes with the configuration.

    Returns:
        The sizes.

    Raises:
        FlexpatchError: If the configuration cannot be read, or lacks a size.
    """
    if name in PRESETS:
        return PRESETS[name]
    return sizes_of(load_config(name, trust_remote_code=trust_remote_code), name)


def sizes_of(configuration: Any, name: str) -> Model:
    """Read the sizes of a model's configuration.

    Args:
        configuration: Of transformers.
        name: What to call the model in error messages.

    Returns:
        The sizes.

    Raises:
        FlexpatchError: If the configuration lacks a size.
    """
    config = configuration.get_text_config().to_dict()
    try:
        hidden, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        ffn, vocabulary = config["intermediate_size"], config["vocab_size"]
        if experts := config.get("num_experts_per_tok"):
            ffn = experts * config.get("moe_intermediate_size", ffn) + config.get("shared_expert_intermediate_size", 0)
        head_size = config.get("head_dim") or hidden // heads
    except KeyError as error:
        raise FlexpatchError(f"the configuration of {name} has no {error}; try {', '.join(PRESETS)}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise FlexpatchError(f"the configuration of {name} has sizes that are not numbers: {error}") from error
    sizes = Model(hidden, layers, ffn, heads, config.get("num_key_value_heads") or heads, head_size, vocabulary)
    for size, value in sizes._asdict().items():
        if not isinstance(value, int) or value < 1:
            raise FlexpatchError(
                f"the configuration of {name} gives {size} = {value!r:.40}; expected a positive integer"
            )
    return sizes
