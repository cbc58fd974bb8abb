"""Does a patched model compute what the unpatched one does?

Three independent checks, on the device, in the dtype and under the checkpointing setting that will be trained with:

1. **Leak**, no tolerance: change every token of one answer; no logit outside it may change by a single bit. In a
   mixture of experts a token's routing alters the shapes of other tokens' matrix products, and with them the rounding;
   there the derivative of all outside logits by the answer's embeddings must be exactly zero.
2. **Log-probs** of every answer token, in one packed row and in several padded ones, against separate runs.
3. **Gradients** of the DPO loss by all trainable parameters, against separate runs.

The unpatched model is the oracle. In float64 the two are compared directly. In any lower precision both are compared
with the same weights in float64 (the truth; float32 for 16-bit models whose float64 copy does not fit into memory), and
ours may be off by no more than a stated multiple of what stock is.

Each check is repeated with a mask or positions broken on purpose (the negative controls), and must then fail.
"""

import copy
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from flexpatch.errors import FlexpatchError
from flexpatch.logprobs import answer_logprobs, separate_logprobs, sum_answers
from flexpatch.patch import (
    apply,
    backend_of,
    dequantize,
    eager_experts,
    model_inputs,
    remove,
    savings,
    settings_of,
    text_config,
)  # fmt: skip
from flexpatch.registry import Adapter, adapter_for
from flexpatch.tree import Rows, Tree, build_rows

# Largest error of a float64 model against its own separate runs: log-probs in nats, gradients relative to their norm.
# The norms of transformers' models compute in float32, which keeps gradients near 5e-8.
LOGPROB_BOUND = 1e-10
GRADIENT_BOUND = 1e-6
# In lower precision, and for float64 models with a float32 softmax: allowed multiple of the stock model's own error, in
# the mean over tokens and in the norm of gradients. The worst of some hundred tokens scatters more.
FACTOR = 2.0
WORST_FACTOR = 4.0
# How far beyond the bound a broken mask must be in float64.
CONTROL_MARGIN = 1000.0
BETA = 0.1

Gradients = dict[str, Tensor]


@dataclass
class Check:
    """One comparison. It passes if ``error <= bound``; a negative control if ``error > margin * bound``.

    Attributes:
        name: What was compared.
        error: Tokens that leak, nats, or a relative norm.
        bound: What is allowed.
        detail: Where the worst error is.
        margin: For a negative control: how far beyond the bound it must be.
    """

    name: str
    error: float
    bound: float
    detail: str = ""
    margin: float | None = None

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return self.error <= self.bound if self.margin is None else self.error > self.margin * self.bound

    def __str__(self) -> str:
        if self.margin is None:
            verdict = "ok" if self.passed else f"FAILS  {self.detail}"
        else:
            verdict = ("caught" if self.passed else "NOT CAUGHT") + (
                f", {self.error / self.bound:.0e} x bound" if self.bound else ""
            )
        return f"{self.name:<50} {self.error:>8.2g} {self.bound:>8.2g}  {verdict}"


@dataclass
class Report:
    """What was verified, where, and how it came out.

    Attributes:
        model: Its name.
        settings: Device, dtype, versions, and whatever else the results hold for.
        checks: Comparisons and negative controls, in the order they were made.
    """

    model: str
    settings: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check holds and every negative control was caught."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"model": self.model, "passed": self.passed, "settings": self.settings, "checks": checks}

    def __str__(self) -> str:
        settings = " · ".join(f"{key} {value}" for key, value in self.settings.items())
        head = f"{'check':<50} {'error':>8} {'bound':>8}"
        verdict = "parity holds" if self.passed else "PARITY FAILS"
        return "\n".join([self.model, settings, "", head, *map(str, self.checks), "", verdict])


def check_parity(
    model: nn.Module,
    *,
    name: str | None = None,
    backend: str = "auto",
    compile: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Run all checks on a model as it is: its device, dtype, adapters, mode and checkpointing.

    The model is left as it was found, patched or not; its gradients are cleared.

    Args:
        model: A causal language model of a supported architecture, bare or wrapped by peft.
        name: What to call it in the report.
        backend, compile: As in :func:`flexpatch.apply`.
        seed: Of the token ids.
        progress: Show a progress bar on stderr.

    Raises:
        UnsupportedModelError: If the model cannot be patched.
        FlexpatchError: If its weights or log-probs are not finite, or the float64 truth does not fit into memory.
    """
    before = settings_of(model)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would hide a wrong mask behind its rounding
    try:
        remove(model)
        model.zero_grad(set_to_none=True)  # each pass clears its own after reading them
        return _Verification(
            model, name or type(model).__name__, dict(backend=backend, compile=compile), seed, progress
        ).run()
    finally:
        torch.set_float32_matmul_precision(precision)
        model.zero_grad(set_to_none=True)
        remove(model) if before is None else apply(model, **before)


class _Verification:
    """One run of all checks. Its tokens are drawn at the start: every pass sees the same."""

    def __init__(self, model: nn.Module, name: str, options: dict[str, Any], seed: int, progress: bool) -> None:
        _check_weights(model)
        self.model = model
        self.options = options
        self.config = text_config(model)
        self.adapter = adapter_for(self.config)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.exact = self.dtype == torch.float64
        generator = torch.Generator().manual_seed(seed)
        self.trees = _sample_trees(self._reach(), self.config.vocab_size, generator)
        self.rows = build_rows([self.trees]).to(self.device)
        self.padded_rows = build_rows([self.trees[:1], self.trees[1:]]).to(self.device)
        self.noise = torch.randn(len(self.rows.sample_of_answer), generator=generator).to(self.device)
        self.bar = tqdm(desc="verify", unit=" passes", disable=not progress, leave=False, file=sys.stderr)
        self.report = Report(name, _settings(model, self.device, self.dtype))

    def run(self) -> Report:
        # Norms and ropes round to float32, which blows a difference in the last bit up to 1e-8, one time in a thousand.
        # Checkpointing recomputes outside the mode, and compiled kernels do not know it.
        lifted = self.exact and self.device.type == "cpu" and not _checkpoints(self.model)
        # A float64 model is its own truth, but for the float32 softmax of eager attention.
        direct = lifted or (self.exact and self.adapter.implementations[0] != "eager")
        with _Float64() if lifted else nullcontext():
            return self._run(direct)

    def _run(self, direct: bool) -> Report:
        stock, stock_gradients = self._separate(self.model)
        if not stock.isfinite().all():
            raise FlexpatchError("the unpatched model's log-probs are not finite; there is nothing to compare with")
        truth, truth_gradients = (stock, stock_gradients) if direct else self._truth(stock)
        oracle, oracle_gradients = (stock, stock_gradients) if self.exact else (truth, truth_gradients)
        gradient_bound = self._bound(GRADIENT_BOUND, FACTOR * _distance(stock_gradients, truth_gradients)[0])
        means = "" if self.exact else ", mean"
        bound = self._bound(LOGPROB_BOUND, FACTOR * self._error(stock, truth))
        worst_bound = self._bound(LOGPROB_BOUND, WORST_FACTOR * _worst(stock, truth))

        apply(self.model, **self.options)
        broken = replace(self.rows, ends=_whole_trees(self.rows), masks={})
        self.report.settings["backend"] = backend = backend_of(self.model)
        if self.options["compile"] and backend != "dense":
            self.report.settings["compiled"] = "layers"
        kind = "derivatives" if self._routes() else "logits"
        detail = "an answer reaches tokens outside it"
        self._add(f"leak ({kind} outside a changed answer)", self._leaks(self.rows), 0, detail)
        folded, folded_gradients = self._separate(self.model, sum_answers(stock, self.rows), batch_size=None)
        assert savings(self.model).folded == len(self.trees), "each tree's padded batch gains"
        packed = (self._logprobs(rows) for rows in (self.rows, self.padded_rows))
        for layout, ours in zip(("one row", "padded rows", "folded batches"), (*packed, folded), strict=True):
            self._add(f"log-probs, {layout}{means}", self._error(ours, oracle), bound, self._where(ours, oracle))
            if not self.exact:
                name = f"log-probs, {layout}, worst token"
                self._add(name, _worst(ours, oracle), worst_bound, self._where(ours, oracle))
        if isinstance(self.model, peft.PeftModel):
            self._adapters_off(worst_bound)
        error, worst = _distance(self._gradients(self.rows, stock), oracle_gradients)
        self._add("gradients of the DPO loss", error, gradient_bound, f"worst in {worst}")
        error, worst = _distance(folded_gradients, oracle_gradients)
        self._add("gradients, folded batches", error, gradient_bound, f"worst in {worst}")

        margin = CONTROL_MARGIN if self.exact else 1.0
        self._add("control, leak: answers see each other", self._leaks(broken), 0, margin=margin)
        for name, rows, adapter in self._breakages(broken):
            error = self._error(self._logprobs(rows, adapter), oracle)
            self._add(f"control, log-probs: {name}", error, bound, margin=margin)
        error, _ = _distance(self._gradients(broken, stock), oracle_gradients)
        self._add("control, gradients: answers see each other", error, gradient_bound, margin=margin)
        self.bar.close()
        return self.report

    # --- passes ---------------------------------------------------------------------------------------------------

    def _separate(
        self, model: nn.Module, constants: Tensor | None = None, batch_size: int | None = 1
    ) -> tuple[Tensor, Gradients]:
        """Token log-probs and DPO gradients from ordinary batches: of an unpatched model one sequence at a time.

        ``constants``: answer log-probs that the reference's are made of; ``None`` for the model's own.
        """
        tokens = []
        for tree, here in zip(self.trees, self._samples(), strict=True):
            logps = separate_logprobs(model, [tree], batch_size=batch_size)
            base = logps.answers.detach() if constants is None else constants[here]
            _dpo(logps.answers, base + self.noise[here]).backward()
            tokens.append(logps.tokens.detach())
            self.bar.update()
        return torch.cat(tokens), _take_gradients(model)

    def _truth(self, stock: Tensor) -> tuple[Tensor, Gradients]:
        """The same of the same weights in float64, with no value rounded to float32 on the way. A 16-bit model whose
        float64 copy does not fit into memory is held to float32."""
        weights = sum(p.numel() * (2 if p.requires_grad else 1) for p in self.model.parameters())  # and gradients
        free = _free_memory(self.device)
        dtypes = [torch.float64] if self.dtype.itemsize > 2 else [torch.float64, torch.float32]
        dtype = next((dtype for dtype in dtypes if dtype.itemsize * weights < free), None)
        if dtype is None:
            need = dtypes[-1].itemsize * weights
            raise FlexpatchError(
                f"a copy of the model in {dtypes[-1]}, with gradients, needs {need / 1e9:.1f} GB on {self.device}; "
                f"{free / 1e9:.1f} are free: verify it with --lora, or a smaller model of the architecture"
            )
        self.report.settings["truth"] = str(dtype).removeprefix("torch.")
        model = eager_experts(dequantize(copy.deepcopy(self.model)).to(dtype))
        if _checkpoints(model):
            model.gradient_checkpointing_disable()  # type: ignore[operator]  # recomputation would leave the mode below
        with _Float64():
            return self._separate(model, sum_answers(stock, self.rows))

    @torch.no_grad()
    def _logprobs(self, rows: Rows, adapter: Adapter | None = None) -> Tensor:
        self.bar.update()
        return answer_logprobs(self.model, rows, adapter=adapter).tokens

    def _gradients(self, rows: Rows, stock: Tensor) -> Gradients:
        reference = sum_answers(stock, self.rows) + self.noise
        answers = answer_logprobs(self.model, rows).answers
        torch.stack([_dpo(answers[here], reference[here]) for here in self._samples()]).sum().backward()
        self.bar.update()
        return _take_gradients(self.model)

    @torch.no_grad()
    def _adapters_off(self, bound: float) -> None:
        """The reference pass of a LoRA run, against the same pass unpatched. In low precision both are off the truth:
        ours by WORST_FACTOR, the other by one time its error."""
        with self.model.disable_adapter():  # type: ignore[operator]
            remove(self.model)
            stock = separate_logprobs(self.model, self.trees, batch_size=1).tokens
            apply(self.model, **self.options)
            ours = self._logprobs(self.rows)
        bound *= 1.0 if self.exact else 1 + 1 / WORST_FACTOR
        self._add("log-probs, adapters off", _worst(ours, stock), bound, self._where(ours, stock))

    def _leaks(self, rows: Rows) -> float:
        """How many tokens the first answer reaches outside itself (or, by derivatives, with how many of its own)."""
        self.bar.update()
        own = rows.answer_tokens[0]
        own = own[own < len(rows.targets)]
        start = int(rows.sources[own[1]])  # what predicts an answer's second token is its first
        inside = torch.zeros_like(rows.input_ids, dtype=torch.bool)
        inside[0, start : start + len(own)] = True
        inputs = model_inputs(self.model, rows)
        if self._routes():
            return self._derivatives(inputs, inside)
        usable = self.config.vocab_size - 3
        ids = torch.where(inside, (rows.input_ids - 3 + usable // 2) % usable + 3, rows.input_ids)
        with torch.no_grad():
            if "compiled" in self.report.settings:
                # Graphs that share a kernel settle on its configuration, and so on last bits, in the first call.
                self.model(**inputs)
            differ = self.model(**inputs).logits != self.model(**(inputs | {"input_ids": ids})).logits
        return float((differ.any(-1) & ~inside).sum())

    def _derivatives(self, inputs: dict[str, Any], inside: Tensor) -> float:
        """Tokens inside by which some outside logit has a derivative other than zero."""
        embedded: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = self.model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
        try:
            logits = self.model(**inputs).logits[~inside]
        finally:
            hook.remove()
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)).sum().backward()
        self.model.zero_grad(set_to_none=True)
        gradient = embedded[0].grad
        assert gradient is not None
        return float((gradient[:, : inside.shape[1]][inside] != 0).any(-1).sum())  # compiled rows are padded

    def _breakages(self, broken: Rows) -> Iterator[tuple[str, Rows, Adapter | None]]:
        """Rows and adapters with one thing wrong each."""
        yield "answers see each other", broken, None
        length = self.rows.input_ids.shape[1]
        indices = torch.arange(length, device=self.device)[None]
        yield "packed indices as positions", replace(self.rows, position_ids=indices, depth=length, masks={}), None
        if self._reach():
            unlimited = replace(self.adapter, windows=lambda config: dict.fromkeys(self.adapter.windows(config)))
            yield "windows dropped", self.rows, unlimited

    # --- small things ---------------------------------------------------------------------------------------------

    def _add(self, name: str, error: float, bound: float, detail: str = "", margin: float | None = None) -> None:
        self.report.checks.append(Check(name, float(error), float(bound), detail, margin))

    def _bound(self, absolute: float, of_stock: float) -> float:
        """``of_stock``: the allowed multiple of the stock model's distance from the truth."""
        return max(of_stock, absolute) if self.exact else of_stock

    def _error(self, ours: Tensor, oracle: Tensor) -> float:
        return _worst(ours, oracle) if self.exact else float((ours.double() - oracle.double()).abs().mean())

    def _reach(self) -> int:
        """The largest window of any layer, 0 if there are none, or if the backend takes no longer sequences."""
        if self.options["backend"] == "fa4":
            return 0
        windows = self.adapter.windows(self.config)
        used = set(getattr(self.config, "layer_types", None) or ()) & set(windows) or set(windows)
        return max(windows[layer_type] or 0 for layer_type in used)

    def _samples(self) -> Iterator[slice]:
        """The answers of each tree."""
        start = 0
        for count in torch.bincount(self.rows.sample_of_answer).tolist():
            yield slice(start, start + count)
            start += count

    def _where(self, ours: Tensor, oracle: Tensor) -> str:
        worst = int((ours - oracle).abs().nan_to_num(math.inf).argmax())
        answer, offset = map(int, (self.rows.answer_tokens == worst).nonzero()[0])
        sample = int(self.rows.sample_of_answer[answer])
        nth = answer - int((self.rows.sample_of_answer < sample).sum())
        return f"worst: sample {sample}, answer {nth}, token {offset}"

    def _routes(self) -> bool:
        names = [name for name, _ in self.model.named_modules()]
        return any(part in name for name in names for part in ("experts", "moe"))  # Granite's, in transformers 5.0


class _Float64(TorchFunctionMode):
    """Keeps float64 tensors float64: transformers' norms, ropes and eager softmax ask for float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.type and torch.float32 in args[1:]):
                return args[0]
            if func in (F.softmax, Tensor.to):
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
                kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
            if func in (Tensor.matmul, Tensor.__matmul__, torch.matmul):  # ropes multiply by positions in float32
                args = (args[0], args[1].to(torch.float64), *args[2:])
        return func(*args, **kwargs)


def _sample_trees(reach: int, vocabulary: int, generator: torch.Generator) -> list[Tree]:
    """Trees with uneven answers, one-token runs, a nested level, and answers that begin alike. The first prompt is
    longer than ``reach``, so that windows cut it and index distances differ from position distances."""

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    prompt, chosen, rejected = ids(reach + 40), ids(29), ids(11)
    # Nothing of the chosen answer is shared, so the leak check may change all of it.
    rejected[0] = (chosen[0] - 2) % (vocabulary - 3) + 3
    like = ids(6)
    return [
        Tree.of(prompt, chosen, rejected),
        Tree.of(ids(1), ids(1), ids(35), ids(3)),
        Tree(ids(12), [Tree(ids(5), [Tree(ids(4), [Tree(ids(6)), Tree(ids(7))], answer=False)], answer=True)]),
        Tree.of(ids(17), like + ids(4), like + ids(9), like),
    ]


def _dpo(answers: Tensor, reference: Tensor) -> Tensor:
    """DPO loss of one sample: its first answer chosen over each other, summed."""
    rewards = BETA * (answers - reference.to(answers))
    return -F.logsigmoid(rewards[:1] - rewards[1:]).sum()


def _whole_trees(rows: Rows) -> Tensor:
    """The ends of naive packing, where every token of a tree sees all before it."""
    roots = torch.where(rows.position_ids == 0, torch.arange(rows.ends.shape[1], device=rows.ends.device), 0)
    return rows.ends.gather(-1, roots.cummax(-1).values)


def _worst(ours: Tensor, oracle: Tensor) -> float:
    return float((ours.double() - oracle.double()).abs().max())


def _distance(ours: Gradients, oracle: Gradients) -> tuple[float, str]:
    """||ours - oracle|| / ||oracle|| over all parameters together, and the parameter that adds most to it."""
    squares = {name: float((ours[name].double() - oracle[name].double()).square().sum()) for name in oracle}
    norm = sum(float(gradient.double().square().sum()) for gradient in oracle.values())
    return math.sqrt(sum(squares.values()) / norm), max(squares, key=lambda name: squares[name])


def _take_gradients(model: nn.Module) -> Gradients:
    """Gradients of all trainable parameters, moved to the CPU and cleared on the model."""
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    if not gradients:
        raise FlexpatchError("no parameter of the model got a gradient; unfreeze some, or add LoRA adapters")
    return gradients


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FlexpatchError(f"the weight '{name}' holds NaN or infinite values")


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _settings(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    settings = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(model, peft.PeftModel):
        settings["peft"] = peft.__version__
    if _checkpoints(model):
        settings["checkpointing"] = "on"
    return settings
