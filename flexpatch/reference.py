"""Reference log-probabilities of a whole dataset, computed once and kept in a safetensors file."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from flexpatch.errors import FlexpatchError, first_line
from flexpatch.internals import base_weights
from flexpatch.logprobs import answer_logprobs
from flexpatch.packing import pack
from flexpatch.patch import settings_of
from flexpatch.rows import build_rows
from flexpatch.tree import Layout, Tree, lay_out


@torch.no_grad()
def reference_logprobs(
    model: nn.Module,
    trees: Sequence[Tree | Layout],
    *,
    capacity: int,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Compute the log-probs of every sample's answers under the reference model.

    Args:
        model: A patched model. A peft model runs with its adapters off; any other model is itself the reference.
        trees: The samples: trees, or layouts from :func:`flexpatch.lay_out` or :meth:`flexpatch.Collator.layout`.
            Error messages number trees from 0; layouts keep their names.
        capacity: Most tokens of a row. Samples are packed first-fit-decreasing.
        cache_dir: Folder that keeps the result. The file name is a hash of the reference's weights and configuration,
            the samples, the dtype, the backend and the device type, so any change recomputes the result.
        progress: Show a progress bar.

    Returns:
        One tensor a sample: (answers,) float32, summed log-probs in nats, on the CPU.

    Raises:
        FlexpatchError: For a malformed tree, a sample longer than ``capacity``, a result that is not finite (the
            message names the sample), or a damaged cache file.
    """
    layouts = [tree if isinstance(tree, Layout) else lay_out(tree, i) for i, tree in enumerate(trees)]
    path = None
    counts = [len(layout.answers) for layout in layouts]
    if cache_dir is not None:
        path = Path(cache_dir) / f"reference-{_key(model, layouts)}.safetensors"
        if path.exists():
            return list(_load(path, sum(counts)).split(counts))
    device = next(model.parameters()).device
    values: list[Tensor] = [torch.empty(0)] * len(layouts)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with getattr(model, "disable_adapter", nullcontext)():
            for samples in tqdm(
                pack(list(map(len, layouts)), capacity), desc="reference", unit="row", disable=not progress
            ):
                rows = build_rows([[layouts[i] for i in samples]]).to(device)
                answers = answer_logprobs(model, rows).answers.float().cpu()
                for i, value in zip(samples, answers.split([counts[i] for i in samples]), strict=True):
                    if not value.isfinite().all():
                        raise FlexpatchError(
                            f"sample {i}: the reference model gives {value.tolist()}; check its weights"
                        )
                    values[i] = value
    finally:
        for module, training in modes.items():  # not model.train(): parts may have been in eval mode
            module.training = training
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{uuid4().hex}.partial")  # of this process alone, since ranks may share a cache
        logprobs = torch.cat([torch.empty(0), *values])
        save_file({"logprobs": logprobs}, partial, metadata={"blake2b": _digest(logprobs)})
        partial.replace(path)  # a killed run leaves no half-written cache
    return values


def _load(path: Path, answers: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            logprobs, digest = file.get_tensor("logprobs"), (file.metadata() or {}).get("blake2b")
        if logprobs.dtype != torch.float32 or _digest(logprobs) != digest:
            raise ValueError("its values have changed since they were written")
        if logprobs.shape != (answers,):
            raise ValueError(f"it holds {tuple(logprobs.shape)} values, not {answers}")
    except Exception as error:
        raise FlexpatchError(f"the reference cache {path} cannot be used ({first_line(error)}); delete it") from error
    return logprobs


def _digest(values: Tensor) -> str:
    """Hash log-probs, because a value that was damaged on a disk looks like any other value."""
    return hashlib.blake2b(values.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _key(model: nn.Module, layouts: Sequence[Layout]) -> str:
    """Hash everything that the log-probs depend on."""
    digest = hashlib.blake2b(b"2", digest_size=16)  # version of the file's format
    settings, tensors = base_weights(model)
    settings["flexpatch"] = (settings_of(model) or {}).get("backend")
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    for layout in layouts:
        for array in (layout.ids, layout.ends, layout.predictors, layout.targets):
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
        for each in layout.images:
            digest.update(f"{each.start} {each.stop}".encode())
            for name, tensor in sorted(each.given.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
        digest.update(json.dumps(layout.answer_lengths).encode())
    return digest.hexdigest()
