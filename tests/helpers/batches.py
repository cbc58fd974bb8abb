"""Padded batches, random ones and a plain one, and the models that they are folded for."""

from typing import Any

import numpy as np
import torch

# Full attention, windows on all layers, on some, two ropes; Gemma 2 in float64 gives NaN for padded batches unpatched.
KINDS = [("llama", 0), ("mistral", 1), ("qwen3", 1), ("gemma3_text", 0), ("gemma3", 0)]


def random_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of up to 9 sequences of 1 to 40 tokens that often begin alike, repeat, and are padded anyhow."""
    vocabulary = int(rng.integers(2, 148))
    bases = [rng.integers(3, 3 + vocabulary, rng.integers(1, 30)) for _ in range(rng.integers(1, 4))]
    sequences = []
    for _ in range(rng.integers(1, 10)):
        base = bases[rng.integers(len(bases))]
        cut = base[: rng.integers(0, len(base) + 1)]
        sequences.append(np.concatenate([cut, rng.integers(3, 3 + vocabulary, rng.integers(cut.size == 0, 11))]))
        if rng.random() < 0.3:
            sequences.append(sequences[rng.integers(len(sequences))])
    S = max(map(len, sequences)) + int(rng.integers(0, 4))
    ids, mask = rng.integers(0, 3, (len(sequences), S)), np.zeros((len(sequences), S), bool)
    side = rng.choice(["right", "left", "any", "holes"])
    for n, sequence in enumerate(sequences):
        room = S - len(sequence)
        columns = np.arange(len(sequence)) + {"right": 0, "left": room}.get(side, int(rng.integers(room + 1)))
        if side == "holes":
            columns = np.sort(rng.permutation(S)[: len(sequence)])
        ids[n, columns], mask[n, columns] = sequence, True
    return ids, mask


def tensors(ids: np.ndarray, mask: np.ndarray, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    return dict(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).to(dtype), use_cache=False)


def padded_batch(seed: int = 0) -> dict[str, Any]:
    """Three prompts with three answers each, padded on the right."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in (20, 11, 5):
        prompt = rng.integers(3, 151, length)
        rows += [np.concatenate([prompt, rng.integers(3, 151, rng.integers(1, 14))]) for _ in range(3)]
    ids = np.zeros((9, max(map(len, rows))), np.int64)
    mask = np.arange(ids.shape[1]) < np.array([[len(row)] for row in rows])
    ids[mask] = np.concatenate(rows)
    return tensors(ids, mask)
