"""What the parity tests share: awkward trees, the oracle, the gradient of a loss, and rows broken on purpose."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from parameterized import param
from torch import Tensor, nn
from torch.nn import functional as F

import flexpatch
from flexpatch import Adapter, Rows, Tree
from flexpatch.float64 import Float64
from flexpatch.internals import pretrained
from flexpatch.logprobs import AnswerLogprobs, score_rows
from flexpatch.models import tiny_model, tiny_types, variants
from flexpatch.patch import settings_of
from flexpatch.registry import adapters
from flexpatch.row_calls import row_inputs
from flexpatch.trials import in_one_batch
from flexpatch.verification import FLOAT64_FACTOR, GRADIENT_BOUND, LOGPROB_BOUND

# Smallest bounds in float64: log-probs in nats, the gradient relative to its norm.
BOUNDS = (LOGPROB_BOUND, GRADIENT_BOUND)
# A broken mask must be at least this many bounds off.
CONTROL = 1000

# Every (model_type, variant) that an adapter serves and the installed transformers has. Their windows are 8 tokens.
MODELS = [(model_type, variant) for model_type in tiny_types() for variant in range(len(variants(model_type)))]

# The first type of each record: fast tests take these, slow ones all.
FIRST = list(
    {
        adapter.name: model_type for model_type, adapter in reversed(adapters().items()) if model_type in tiny_types()
    }.values()
)

# Of all, the ones whose unpatched models look at no positions: scans and convolutions see the order of tokens.
WITHOUT_POSITIONS = [
    *(("mamba", 0), ("mamba2", 0), ("falcon_mamba", 0), ("rwkv", 0), ("xlstm", 0), ("jamba", 0), ("zamba", 0)),
    *(("zamba2", 1), ("nemotron_h", 0), ("granitemoehybrid", 0), ("kimi_linear", 0)),
    *(("glm5_next", 0), ("glm5_next_text", 0), ("inkling_text", 0)),
    *(("bloom", 0), ("bloom", 1), ("mpt", 0), ("falcon", 2), ("trocr", 0), ("trocr", 1)),
]


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Runs of random token ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 151, (length,), generator=generator).tolist() for length in lengths]


def trees() -> list[Tree]:
    """All shapes a tree can have: 300 tokens, so three blocks, and most runs are longer than every window."""
    p, q, r, s, *a = random_ids(50, 21, 12, 10, 31, 17, 23, 9, 5, 14, 11, 6, 19, 13, 7)
    return [
        Tree.of(p, a[0], a[1]),
        Tree.of([4], [5], a[2]),  # a prompt of one token, an answer of one token
        Tree.of(q, a[3], [6], a[4]),  # three answers
        Tree.of(q, a[5], a[5]),  # equal answers; and the prompt of another tree
        Tree.of(r, a[4] + a[6], a[4] + a[7]),  # answers that begin alike
        Tree.of(s, a[8], a[8] + a[9]),  # an answer that begins another
        # A dialogue: two unscored branches and a scored turn that two answers continue.
        Tree(r, [Tree(s, [Tree(a[0]), Tree(a[9])], answer=False), Tree(a[10], [Tree(a[4]), Tree(a[3])], answer=True)]),
        Tree(q[::-1], answer=True),  # an ordinary sequence
        Tree.of(s[::-1], a[7]),
    ]


def few() -> list[Tree]:
    """Some of these, for fast tests of many types: a pair, answers that begin alike, a dialogue, a sequence."""
    every = trees()
    return [every[0], every[4], every[6], every[8]]


def gradient(model: nn.Module, answers: Tensor) -> Tensor:
    """The DPO loss's gradient in all trainable parameters, as one vector. Answers are paired in turn."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None
    flexpatch.dpo_loss(answers[: len(answers) // 2 * 2]).loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def answers_under(model: nn.Module, rows: Rows, adapter: Adapter | None) -> AnswerLogprobs:
    """Log-probs of a patched model's rows under another record of its architecture, broken on purpose, if given."""
    if adapter is None:
        return flexpatch.answer_logprobs(model, rows)
    settings = settings_of(model)
    assert settings is not None
    return score_rows(model, rows, row_inputs(pretrained(model), rows, adapter, settings["backend"]))


@dataclass(frozen=True)
class Result:
    """Log-probs and a loss's gradient of one model on :func:`trees`."""

    tokens: Tensor
    answers: Tensor
    gradient: Tensor

    @classmethod
    def packed(cls, model: nn.Module, rows: Rows, adapter: Adapter | None = None) -> "Result":
        return cls.of(model, answers_under(model, rows, adapter))

    @classmethod
    def of(cls, model: nn.Module, logps: AnswerLogprobs) -> "Result":
        return cls(logps.tokens.detach(), logps.answers.detach(), gradient(model, logps.answers))

    def errors(self, true: "Result") -> tuple[float, float]:
        """Largest log-prob error in nats, and the norm of the gradient's error over the gradient's."""
        logps = max((self.tokens - true.tokens).abs().max(), (self.answers - true.answers).abs().max())
        return float(logps), float((self.gradient - true.gradient).norm() / true.gradient.norm())

    def matches(self, true: "Result", bounds: tuple[float, float] = BOUNDS) -> None:
        logps, gradient = self.errors(true)
        assert logps <= bounds[0], f"log-probs are {logps} nat off"
        assert gradient <= bounds[1], f"the gradient is {gradient} off"

    def differs(self, true: "Result", bounds: tuple[float, float] = BOUNDS, what: str = "broken on purpose") -> None:
        """The negative control of :meth:`matches`."""
        logps, gradient = self.errors(true)
        assert logps > CONTROL * bounds[0], f"{what}, yet log-probs are only {logps} nat off"
        assert gradient > CONTROL * bounds[1], f"{what}, yet the gradient is only {gradient} off"


@cache
@torch.enable_grad()
def oracle(model_type: str, variant: int, lifted: bool = False, samples: Callable[[], list[Tree]] = trees) -> Result:
    """An unpatched model that sees every answer with its prompt as a sequence of its own.

    ``lifted``: with no step of it in float32; what it is compared with must run under :class:`Float64` too.
    """
    model = tiny_model(model_type, variant)
    with Float64() if lifted else nullcontext():
        return Result.of(model, separate(model, samples()))


@cache
@torch.enable_grad()
def bounds_of(model_type: str, variant: int = 0, lifted: bool = False) -> tuple[float, float]:
    """How far a patched model may be off its :func:`oracle`: ten times what the oracle is off itself, or a floor.

    Its own error is what it shows in a batch of another shape and, not ``lifted``, in attention with a float64 softmax,
    which is what FlexAttention has. Routers in float32 make it about 1e-7 nats, eager attention 1e-6.
    """
    model, true = tiny_model(model_type, variant), oracle(model_type, variant, lifted)
    with Float64() if lifted else nullcontext():
        own = [Result.of(model, in_one_batch(model, trees())).errors(true)]
    if not lifted:
        with Float64(attention_only=True):
            own.append(Result.of(model, separate(model, trees())).errors(true))
    logps, gradient = (FLOAT64_FACTOR * max(errors) for errors in zip(*own, strict=True))
    return max(BOUNDS[0], logps), max(BOUNDS[1], gradient)


def separate(model: nn.Module, samples: Sequence[Tree]) -> AnswerLogprobs:
    # Without padding: in float64 Gemma 2's eager attention gives NaN for padding that its window leaves without a key.
    return flexpatch.separate_logprobs(model, samples, batch_size=1)


def read(logits: Tensor, rows: Rows) -> AnswerLogprobs:
    """Log-probs of the answers from the logits of all tokens."""
    tokens = logits.flatten(0, 1)[rows.predictors].log_softmax(-1).gather(-1, rows.targets[:, None])[:, 0]
    answers = [tokens[answer[answer < len(tokens)]].sum() for answer in rows.answer_tokens]
    return AnswerLogprobs(torch.stack(answers), tokens)


def deep(model_type: str, layers: int) -> nn.Module:
    """A tiny model of so many layers, all like its first two by turns, with weights of their own."""
    model = tiny_model(model_type)
    model.config.num_hidden_layers = layers
    while len(model.model.layers) < layers:
        layer = copy.deepcopy(model.model.layers[-2], {id(model.config): model.config})
        layer.self_attn.layer_idx = len(model.model.layers)
        for parameter in layer.parameters():
            parameter.data *= 0.9
        model.model.layers.append(layer)
    return model


def name(function: Callable[..., None], number: int, case: param) -> str:
    """Test names that show the case."""
    return "_".join([function.__name__, *map(str, case.args)])


def no_window(adapter: Adapter) -> Adapter:
    """All layers see the whole past."""
    return replace(adapter, windows=lambda config: dict.fromkeys(adapter.windows(config)))


def wider(adapter: Adapter, tokens: int) -> Adapter:
    """Windows that are off by a few tokens."""
    return replace(
        adapter,
        windows=lambda config: {k: None if w is None else w + tokens for k, w in adapter.windows(config).items()},
    )


def see_siblings(rows: Rows) -> Rows:
    """Every answer sees the answers before it: ordinary packing."""
    ends = rows.ends.clone()
    for row in ends:
        start = 0
        while start < len(row):
            stop = max(int(row[start]), start + 1)  # a token that nobody sees ends before itself
            row[start:stop] = stop
            start = stop
    return replace(rows, ends=ends, masks={})


def packed_positions(rows: Rows) -> Rows:
    """Positions are row indices."""
    index = torch.arange(rows.input_ids.shape[1]).expand_as(rows.input_ids)
    return replace(rows, position_ids=index, depth=rows.input_ids.shape[1], masks={})


def float64_norm(self: Any, hidden: Tensor) -> Tensor:
    """transformers' own takes its mean in float32."""
    return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)


def float64_rope(self: Any, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' own takes its angles in float32, which left padding shifts."""
    angles = (position_ids[..., None].double() * self.inv_freq).repeat(1, 1, 2)
    return angles.cos().to(hidden), angles.sin().to(hidden)
