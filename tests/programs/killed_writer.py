"""Reference log-probs whose writer is killed in the middle of the file.

Run by test_reference.py in an empty folder.
"""

import os
import signal
from pathlib import Path
from typing import Any, NoReturn

from helpers.references import LAYOUTS, model
from safetensors.torch import save

from flexpatch import reference, reference_logprobs


def killed(tensors: Any, path: str, metadata: dict[str, str]) -> NoReturn:
    whole = save(tensors, metadata)
    Path(path).write_bytes(whole[: len(whole) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


if __name__ == "__main__":
    reference.save_file = killed
    reference_logprobs(model(), LAYOUTS, capacity=60, cache_dir=".")
