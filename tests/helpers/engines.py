"""Which releases train under engines on CPU ranks."""

import accelerate
import pytest
import transformers
from packaging.version import Version

OLD = Version(transformers.__version__) < Version("5.17") or Version(accelerate.__version__) < Version("1.15")
needs_engines = pytest.mark.skipif(
    OLD,
    reason="stock training fails here with accelerate 1.8 (its launcher on CPUs) and transformers 5.0 (ZeRO-3, and "
    "resuming ranks on CPUs): needs accelerate 1.15 and transformers 5.17",
)
