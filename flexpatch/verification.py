"""One verification: every check of :mod:`flexpatch.parity`, and its negative controls."""

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexpatch.branching import modeling_files, plain
from flexpatch.controls import Passes, check_ways
from flexpatch.errors import FlexpatchError
from flexpatch.float64 import Float64, checkpoints, wide_copy
from flexpatch.internals import pretrained, text_config
from flexpatch.layouts import media_of
from flexpatch.logprobs import answer_logprobs, score_rows, separate_logprobs, sum_answers
from flexpatch.patch import apply, backend_of, model_inputs, remove, savings
from flexpatch.registry import Adapter, adapter_for
from flexpatch.report import Check, Report
from flexpatch.row_calls import row_inputs
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Tree
from flexpatch.trials import (
    Gradients,
    check_weights,
    derivatives,
    distance,
    dpo,
    has_adapters,
    in_one_batch,
    sample_trees,
    take_gradients,
    whole_trees,
    worst_error,
)

# Smallest bounds of a float64 model: log-probs in nats, gradients relative to their norm.
LOGPROB_BOUND = 1e-10
GRADIENT_BOUND = 1e-6
# How many times the stock model's own error in float64 is allowed: both are a handful of roundings, the worst of some
# hundred tokens, drawn anew on every CPU.
FLOAT64_FACTOR = 10.0
# In lower precision: allowed multiple of the stock model's own error, in the mean over tokens and in the norm of
# gradients. The worst of some hundred tokens scatters more.
FACTOR = 2.0
WORST_FACTOR = 4.0
# How far beyond the bound a broken mask must be in float64.
CONTROL_MARGIN = 1000.0


class Verification:
    """One run of all checks. Its tokens are drawn at the start: every pass sees the same."""

    def __init__(self, model: nn.Module, report: Report, options: dict[str, Any], seed: int, progress: bool) -> None:
        check_weights(model)
        self.model = model
        self.report = report
        self.options = options
        self.config = text_config(model)
        self.adapter = adapter_for(pretrained(model).config)
        self.files = modeling_files(model, self.adapter)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.exact = self.dtype == torch.float64
        generator = torch.Generator().manual_seed(seed)
        self.trees = self._draw(generator)
        self.rows = build_rows([self.trees]).to(self.device)
        self.padded_rows = build_rows([self.trees[:1], self.trees[1:]]).to(self.device)
        self.noise = torch.randn(len(self.rows.sample_of_answer), generator=generator).to(self.device)
        self.bar = tqdm(desc="verify", unit=" passes", disable=not progress, leave=False, file=sys.stderr)

    def run(self) -> Report:
        """Run all checks and negative controls."""
        # Norms and ropes round to float32, which blows a difference in the last bit up to 1e-8, one time in a thousand.
        # Checkpointing recomputes outside the mode, and compiled kernels do not know it.
        lifted = self.exact and self.device.type == "cpu" and not (checkpoints(self.model) or self.options["compile"])
        with Float64() if lifted else nullcontext(), plain(self.files if self.exact else ()):
            return self._run(lifted)

    def _run(self, lifted: bool) -> Report:
        stock, stock_gradients = self._separate(self.model)
        if not stock.isfinite().all():
            raise FlexpatchError("the unpatched model's log-probs are not finite; there is nothing to compare with")
        if self.exact:
            oracle, oracle_gradients = stock, stock_gradients
            others = [self._separate(self.model, sum_answers(stock, self.rows), one_batch=True)]
            if not lifted:
                others.append(self._truth(stock, attention_only=True))
            allowed = max(worst_error(stock, other) for other, _ in others)
            bound = worst_bound = max(LOGPROB_BOUND, FLOAT64_FACTOR * allowed)
            allowed = max(distance(stock_gradients, other)[0] for _, other in others)
            gradient_bound = max(GRADIENT_BOUND, FLOAT64_FACTOR * allowed)
        else:
            oracle, oracle_gradients = self._truth(stock)
            bound = FACTOR * self._error(stock, oracle)
            worst_bound = WORST_FACTOR * worst_error(stock, oracle)
            gradient_bound = FACTOR * distance(stock_gradients, oracle_gradients)[0]
        means = "" if self.exact else ", mean"

        positions = self._uses_positions()
        apply(self.model, **self.options)
        broken = replace(self.rows, ends=whole_trees(self.rows))
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
                self._add(name, worst_error(ours, oracle), worst_bound, self._where(ours, oracle))
        if has_adapters(self.model):
            self._adapters_off(worst_bound)
        both = {
            "gradients of the DPO loss": self._gradients(self.rows, stock),
            "gradients, folded batches": folded_gradients,
        }
        for name, each in both.items():
            self._add_gradients(name, each, oracle_gradients, stock_gradients, gradient_bound)

        margin = CONTROL_MARGIN if self.exact else 1.0
        self._add("control, leak: answers see each other", self._leaks(broken), 0, margin=margin)
        for name, rows, adapter in self._breakages(broken, positions):
            error = self._error(self._logprobs(rows, adapter), oracle)
            self._add(f"control, log-probs: {name}", error, bound, margin=margin)
        error, _ = distance(self._gradients(broken, stock), oracle_gradients)
        self._add("control, gradients: answers see each other", error, gradient_bound, margin=margin)
        self._check_ways((oracle, oracle_gradients), (bound, gradient_bound), stock, margin)
        self.bar.close()
        return self.report

    def _draw(self, generator: torch.Generator) -> list[Tree]:
        """Draw the samples."""
        record = media_of(pretrained(self.model).config)
        turns = record is None or not record.text_blocks
        return sample_trees(self._reach(), self.config.vocab_size, generator, turns)

    def _check_ways(self, oracles: Any, bounds: tuple[float, float], stock: Tensor, margin: float) -> None:
        passes = Passes(self._logprobs, partial(self._gradients, stock=stock), self._error)
        self.report.checks += check_ways(
            self.model, self.rows, self.options, passes, oracles, bounds, margin, self.exact
        )

    # --- passes ---------------------------------------------------------------------------------------------------

    def _separate(
        self,
        model: nn.Module,
        constants: Tensor | None = None,
        *,
        batch_size: int | None = 1,
        one_batch: bool = False,
    ) -> tuple[Tensor, Gradients]:
        """Token log-probs and DPO gradients from ordinary batches, tree by tree.

        Args:
            model: Unpatched, or patched to fold.
            constants: Answer log-probs that the reference's are made of; ``None`` for the model's own.
            batch_size: Sequences a call; ``None``: all of a tree, padded.
            one_batch: All sequences of a tree a call, without padding.
        """
        tokens = []
        for tree, here in zip(self.trees, self._samples(), strict=True):
            logps = (
                in_one_batch(model, [tree]) if one_batch else separate_logprobs(model, [tree], batch_size=batch_size)
            )
            base = logps.answers.detach() if constants is None else constants[here]
            dpo(logps.answers, base + self.noise[here]).backward()
            tokens.append(logps.tokens.detach())
            self.bar.update()
        return torch.cat(tokens), take_gradients(model)

    def _truth(self, stock: Tensor, attention_only: bool = False) -> tuple[Tensor, Gradients]:
        """Log-probs and gradients of a wide copy; nothing in it, or no softmax of attention, is rounded to float32."""
        model = wide_copy(self.model)
        if not self.exact:
            self.report.settings["truth"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        with Float64(attention_only), plain(self.files):
            return self._separate(model, sum_answers(stock, self.rows))

    @torch.no_grad()
    def _logprobs(self, rows: Rows, adapter: Adapter | None = None) -> Tensor:
        self.bar.update()
        if adapter is None:
            return answer_logprobs(self.model, rows).tokens
        inputs = row_inputs(pretrained(self.model), rows, adapter, self.options["backend"])
        return score_rows(self.model, rows, inputs).tokens

    def _gradients(self, rows: Rows, stock: Tensor) -> Gradients:
        reference = sum_answers(stock, self.rows) + self.noise
        answers = answer_logprobs(self.model, rows).answers
        torch.stack([dpo(answers[here], reference[here]) for here in self._samples()]).sum().backward()
        self.bar.update()
        return take_gradients(self.model)

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
        self._add("log-probs, adapters off", worst_error(ours, stock), bound, self._where(ours, stock))

    def _leaks(self, rows: Rows) -> float:
        """Count tokens that the first answer reaches outside itself (or, by derivatives, with how many of its own)."""
        self.bar.update()
        own = rows.answer_tokens[0]
        own = own[own < len(rows.targets)]
        start = int(rows.predictors[own[1]])  # an answer's first token predicts its second
        inside = torch.zeros_like(rows.input_ids, dtype=torch.bool)
        inside[0, start : start + len(own)] = True
        inputs = model_inputs(self.model, rows)
        if self._routes():
            return derivatives(self.model, inputs, inside)
        usable = self.config.vocab_size - 3
        ids = torch.where(inside, (rows.input_ids - 3 + usable // 2) % usable + 3, rows.input_ids)
        with torch.no_grad():
            if "compiled" in self.report.settings:
                # Graphs that share a kernel settle on its configuration, and so on last bits, in the first call.
                self.model(**inputs)
            differ = self.model(**inputs).logits != self.model(**(inputs | {"input_ids": ids})).logits
        return float((differ.any(-1) & ~inside).sum())

    def _breakages(self, broken: Rows, positions: bool) -> Iterator[tuple[str, Rows, Adapter | None]]:
        """Rows and adapters with one thing wrong each. ``positions``: whether the unpatched model looks at them."""
        yield "answers see each other", broken, None
        length = self.rows.input_ids.shape[1]
        indices = torch.arange(length, device=self.device)[None]
        if positions or self._reach():
            yield "packed indices as positions", replace(self.rows, position_ids=indices, depth=length), None
        if self._reach():
            unlimited = replace(self.adapter, windows=lambda config: dict.fromkeys(self.adapter.windows(config)))
            yield "windows dropped", self.rows, unlimited

    @torch.no_grad()
    def _uses_positions(self) -> bool:
        """Measure whether the unpatched model's logits depend on ``position_ids``; some hybrids have no positions."""
        ids = self.rows.input_ids[:, : self.rows.depth]
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        logits = [self.model(**inputs, position_ids=each).logits for each in (positions, 2 * positions)]
        return not torch.equal(*logits)

    # --- small things ---------------------------------------------------------------------------------------------

    def _add(self, name: str, error: float, bound: float, detail: str = "", margin: float | None = None) -> None:
        self.report.checks.append(Check(name, float(error), float(bound), detail, margin))

    def _add_gradients(self, name: str, ours: Gradients, oracle: Gradients, stock: Gradients, bound: float) -> None:
        error, worst = distance(ours, oracle)
        self._add(name, error, bound, f"worst in {worst}")

    def _error(self, ours: Tensor, oracle: Tensor) -> float:
        return worst_error(ours, oracle) if self.exact else float((ours.double() - oracle.double()).abs().mean())

    def _reach(self) -> int:
        """The largest window of any layer, 0 if there are none, or if the backend takes no longer sequences."""
        if self.options["backend"] == "fa4":
            return 0
        windows = self.adapter.windows(self.config)
        used = set(getattr(self.config, "layer_types", None) or ()) & set(windows) or set(windows)
        return max((windows[layer_type] or 0 for layer_type in used), default=0)

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
