"""Training under tensor parallelism, as transformers splits a model that it loads; the first rank saves all results.

Run by test_engines.py, in tests/programs:

    torchrun --nproc_per_node 2 cpu_ranks.py tensor_ranks.py DTYPE MODEL FOLDER CASE ...

and by gpu/test_two_gpus.py without cpu_ranks.py. On GPUs rows run on compiled kernels, unless in float64.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.oracle import float64_norm, float64_rope
from helpers.trl_runs import rows
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import flexpatch
from flexpatch import Tree, folding
from programs.engine_ranks import PAIRS, RANK, RANKS, STEPS, _see_siblings

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
# Whether flexpatch is applied, and what it is given.
CASES = {"stock": None, "batches": "batches", "rows": "rows", "answers see each other": "batches"}


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, of all ranks' parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch_logps(model: nn.Module, trees: list[Tree]) -> Tensor:
    """Sums of the answers' log-probs, from an ordinary padded batch: chosen and rejected of each pair in turn."""
    pairs = [(tree.ids, child.ids) for tree in trees for child in tree.children]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, mask, answers = (torch.zeros(len(pairs), length, dtype=torch.long, device=DEVICE) for _ in range(3))
    for i, (prompt, answer) in enumerate(pairs):
        tokens = [*prompt, *answer]
        ids[i, : len(tokens)] = torch.tensor(tokens, device=DEVICE)
        mask[i, : len(tokens)] = 1
        answers[i, len(prompt) : len(tokens)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * answers[:, 1:]).sum(1)


def train(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Losses and log-probs of all steps, gradients of the first, weights after the last."""
    set_seed(0)
    split = dict(tp_plan="auto") if RANKS > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **split).train()
    model = model if RANKS > 1 else model.to(DEVICE)
    if RANKS > 1:
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing is split"
    kind = CASES[name]
    if kind is not None:
        flexpatch.apply(model, backend="dense" if dtype == torch.float64 else "auto")
    # On CUDA torch would update many weights in a call, and refuse split ones beside whole ones.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-3, foreach=False)
    trees = [Tree.of(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows(PAIRS)]
    size = PAIRS // STEPS
    result: dict[str, Any] = dict(losses=[], logps=[])
    for step in range(STEPS):
        some = trees[step * size : (step + 1) * size]
        if kind == "rows":
            logps = flexpatch.answer_logprobs(model, flexpatch.build_rows([some]).to(DEVICE)).answers
        else:
            logps = batch_logps(model, some)
        loss = flexpatch.dpo_loss(logps, torch.zeros_like(logps), beta=0.01).loss
        loss.backward()
        if step == 0:
            result["gradients"] = {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        result["losses"].append(loss.item())
        result["logps"].append(whole(logps))
    if kind == "batches":
        saved = flexpatch.savings(model)
        assert saved.folded == saved.batches == STEPS, saved
    return result | {"weights": {key: whole(parameter) for key, parameter in model.named_parameters()}}


def main(dtype: torch.dtype, model: Path, folder: Path, names: list[str]) -> None:
    LlamaRotaryEmbedding.forward, LlamaRMSNorm.forward = float64_rope, float64_norm
    for name in names:
        see = {"fold_batch": _see_siblings} if "see" in name else {}
        with mock.patch.multiple(folding, **see) if see else mock.patch.dict(os.environ):
            result = train(name, model, dtype)
        if RANK == 0:
            torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    if RANKS > 1:
        distributed.init_process_group("nccl" if CUDA else "gloo")
    if CUDA:
        torch.cuda.set_device(DEVICE)
    main(getattr(torch, sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
