"""Hashes of what short trainings leave behind, computed in a process of their own.

By hand, with PYTHONPATH=.:tests in the environment:

    python tests/programs/determinism_runs.py cpu [--threads 2] [--only long]
    python tests/programs/determinism_runs.py cuda                # under torch.use_deterministic_algorithms
    python tests/programs/determinism_runs.py cuda --undetermined # without it

Prints a line of JSON for every case: its name, the hashes of two runs of seed 0 and of one run of seed 1, and which
parameters the two have different bits in.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from helpers.tokenizers_offline import make_tokenizer
from torch import Tensor, nn

import flexpatch
from flexpatch.models import tiny_model
from flexpatch.packing import epoch_bins
from flexpatch.tree import Tree

STEPS = 3
# Prompts and their four answers. On a GPU rows and folded batches fill one bucket of 1,024, for which kernels compile.
LENGTHS = {"short": ((50, 20, 9), (30, 11, 5, 1)), "long": ((250, 120, 33), (90, 17, 60, 1))}


@dataclass(frozen=True)
class Case:
    """A training: what model, and how it runs."""

    model_type: str
    variant: int
    dtype: torch.dtype
    folded: bool = False
    lora: bool = False
    checkpointing: bool | None = None  # use_reentrant
    lengths: str = "short"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = "folded" if self.folded else "packed"
        checkpointing = {None: "", True: ", reentrant", False: ", non-reentrant"}[self.checkpointing]
        more = "".join(f", {key}={value}" for key, value in self.options.items())
        name = f"{self.model_type} {self.variant}, {str(self.dtype).removeprefix('torch.')}, {kind}, {self.lengths}"
        return f"{name}{', LoRA' if self.lora else ''}{checkpointing}{more}"


def trees(lengths: str, seed: int) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = LENGTHS[lengths]

    def ids(count: int) -> list[int]:
        return torch.randint(3, 151, (count,), generator=generator).tolist()

    return [Tree.of(ids(prompt), *map(ids, answers)) for prompt in prompts]


def build(case: Case, seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    model = tiny_model(case.model_type, case.variant, dtype=case.dtype, seed=seed).to(device).train()
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
        model.enable_input_require_grads()
    if case.lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return flexpatch.apply(model, **case.options)


def folded_logprobs(model: nn.Module, samples: list[Tree], device: str) -> Tensor:
    """Log-probs of answers from the logits of a padded batch, as trainers compute them."""
    pairs = [(list(tree.ids), list(child.ids)) for tree in samples for child in tree.children]
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    scored = mask.clone()
    for row, (prompt, _) in zip(scored, pairs, strict=True):
        row[: len(prompt)] = 0
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return (logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(-1)


def packed_logprobs(model: nn.Module, samples: list[Tree], device: str) -> Tensor:
    return flexpatch.answer_logprobs(model, flexpatch.build_rows([samples]).to(device)).answers


def train(case: Case, seed: int, device: str) -> dict[str, Tensor]:
    """Losses, and all weights after some steps of DPO."""
    model = build(case, seed, device)
    samples = trees(case.lengths, seed)
    logprobs: Callable[..., Tensor] = folded_logprobs if case.folded else packed_logprobs
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS):
        with torch.no_grad(), model.disable_adapter() if case.lora else nullcontext():
            reference = logprobs(model, samples, device)
        loss = flexpatch.dpo_loss(logprobs(model, samples, device), reference).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if case.folded:
        assert flexpatch.savings(model).factor > 1.5, "nothing was folded"
    return {"losses": torch.stack(losses)} | {name: p.detach() for name, p in model.named_parameters()}


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    def of(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()

    return {name: of(tensor) for name, tensor in tensors.items()}


def together(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def data(seed: int) -> str:
    """What a data set becomes: trees, their bins in two epochs, and rows."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "what", "is", "the", "answer", "to", "all", "of", "it"]
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        count = int(torch.randint(1, 30, (1,), generator=generator))
        return "".join(" " + words[int(i)] for i in torch.randint(len(words), (count,), generator=generator))

    collator = flexpatch.Collator(make_tokenizer())
    samples = [dict(prompt=text(), chosen=text(), rejected=text()) for _ in range(40)]
    lengths = [len(collator.layout(sample)) for sample in samples]
    bins = [flexpatch.pack(lengths, 200), *(epoch_bins(lengths, 200, ranks=2, seed=seed, epoch=e) for e in (0, 1))]
    rows = [collator([samples[i] for i in some]) for some in bins[0]]
    hashes = [digest({k: v for k, v in vars(row).items() if isinstance(v, Tensor)}) for row in rows]
    return hashlib.sha256(json.dumps([bins, hashes]).encode()).hexdigest()[:16]


def cpu_cases() -> list[Case]:
    float32 = torch.float32
    cases = [Case("llama", 0, dtype, folded) for dtype in (float32, torch.bfloat16) for folded in (False, True)]
    cases += [Case(*kind, float32, folded=True) for kind in (("gemma2", 0), ("qwen3", 1), ("mixtral", 0))]
    for folded in (False, True):
        cases += [Case("llama", 0, float32, folded, checkpointing=reentrant) for reentrant in (False, True)]
        cases.append(Case("llama", 0, float32, folded, lora=True))
    return [*cases, Case("llama", 0, float32, True, lora=True, checkpointing=False, lengths="long")]


def cuda_cases(undetermined: bool) -> list[Case]:
    """Few, because each attention compiles: all have heads of one shape, and most share kernels."""
    bfloat16 = torch.bfloat16
    kinds = [("llama", 0)] if undetermined else [("llama", 0), ("qwen3", 1), ("mistral", 1), ("gemma2", 0)]
    dtypes = (bfloat16,) if undetermined else (torch.float32, bfloat16)
    cases = [Case(*k, dtype, folded, lengths="long") for k in kinds for dtype in dtypes for folded in (False, True)]
    if undetermined:
        return cases
    cases += [
        Case("llama", 0, bfloat16, folded, lora=True, checkpointing=reentrant, lengths="long")
        for folded in (False, True)
        for reentrant in (False, True)
    ]
    return [
        *cases,
        Case("mixtral", 0, bfloat16, lengths="long"),
        Case("llama", 0, bfloat16, lengths="long", options=dict(compile=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--undetermined", action="store_true")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.device == "cuda" and not args.undetermined)
    cases = cpu_cases() if args.device == "cpu" else cuda_cases(args.undetermined)
    print(json.dumps(dict(case="data", hashes=[data(0), data(0), data(1)], differ=[])), flush=True)
    for case in (case for case in cases if args.only in str(case)):
        first, second, other = (digest(train(case, seed, args.device)) for seed in (0, 0, 1))
        differ = [name for name in first if first[name] != second[name]]
        hashes = [together(digests) for digests in (first, second, other)]
        print(json.dumps(dict(case=str(case), hashes=hashes, differ=differ)), flush=True)


if __name__ == "__main__":
    main()
