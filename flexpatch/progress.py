"""Tell the user that kernels are compiling, where he would wonder why nothing happens."""

import os
import sys
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Timer

import torch
from tqdm import tqdm

AFTER = 2.0  # seconds until the user is told
_seen: set[Hashable] = set()


@contextmanager
def compiling(what: str, tokens: int, *kind: Hashable) -> Iterator[None]:
    """Run a call that may compile kernels. If its kind is new and it takes long, a line on stderr says why.

    Args:
        what: What is compiled, such as ``"attention"``.
        tokens: Length of the rows that it is compiled for.
        kind: All else that kernels are compiled anew for.

    Returns:
        A context for the call.
    """
    key = (what, tokens, *kind)
    if key in _seen:
        yield
        return
    _seen.add(key)
    start = time.perf_counter()
    told: list[bool] = []

    def tell() -> None:
        told.append(True)
        _say(f"flexpatch: compiling {what} for rows of up to {tokens:,} tokens, once for this length")

    timer = Timer(AFTER, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if told:
            _say(f"flexpatch: compiled {what} in {time.perf_counter() - start:.0f} s")


def _say(line: str) -> None:
    """Write a line beside progress bars, in the first process alone."""
    ranked = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if ranked else int(os.environ.get("RANK", 0))
    if rank == 0:
        tqdm.write(line, file=sys.stderr)
