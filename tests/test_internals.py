"""Two files of flexpatch import what is below transformers' top level; lists say which private names each file reads.

Every private name on the lists has a probe in helpers/probes, which test_upgrades.py runs. What is on no list, no file
may read.
"""

import ast
import re
from pathlib import Path

import pytest
from helpers.probes import PROBES
from parameterized import parameterized

FILES = sorted((Path(__file__).resolve().parent.parent / "flexpatch").glob("*.py"))

# Private names of other packages, file by file. They belong in internals.py and dispatch.py; each other file says why.
PRIVATE = {
    "internals": {"_attn_implementation", "_can_set_experts_implementation"},
    # Hooks are found and taken off where they are put on.
    "forward": {
        "_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    },
    # Layers find their row again as they are recomputed.
    "carrying": {"_gradient_checkpointing_func"},
    # Layers keep their products for one call, unless torch debugs checkpoints, which it has no public way to ask.
    "selective": {"_checkpoint_debug_enabled", "_gradient_checkpointing_func"},
    # One walk over all modules before every forward of a row.
    "mixers": {"_modules"},
    # Counts writes to a tensor.
    "masks": {"_version"},
    # Tells tensors that torch.func holds; torch has no public way to ask.
    "calls": {"_functorch"},
    # One walk over all modules before every call: it reads their attributes, and imports nothing.
    "refusals": {"_forward_hooks", "_forward_pre_hooks", "_gradient_checkpointing_func", "_modules"},
    "tuners": {"_buffer_dict", "_forward_hooks", "_forward_pre_hooks", "_niter_", "_peft_config"},
    # Of the same walk; and names of functions that older torchao keeps beside a weight.
    "quantized_layers": {
        "_input_quantizer", "_int8_asymm_per_token_quant", "_int8_symm_per_token_quant",
        "_int8_symm_per_token_reduced_range_quant", "_local_tensor", "_modules", "_output_quantizer", "_parameters",
    },
    # What others have switched on, read with fallbacks where torch and accelerate have no public way to ask.
    "parallelism": {
        "_custom_op_handlers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_op_dispatcher", "_shared_state",
    },
    # Patches models as they are loaded, in processes that launch starts.
    "autopatch": {"_from_config"},
    # Torch's compiler, not Hugging Face's.
    "attention": {"_dynamo"},
    "compiled": {"_dynamo"},
    # Of a named tuple: public.
    "costs": {"_asdict"},
    "estimate": {"_asdict"},
}  # fmt: skip
# Names that quantizers' own objects are compared with: an object of another name is refused, so none is relied on.
COMPARED = {
    "_input_quantizer", "_int8_asymm_per_token_quant", "_int8_symm_per_token_quant",
    "_int8_symm_per_token_reduced_range_quant", "_output_quantizer",
}  # fmt: skip
# Names that are flexpatch's own: keys and suffixes.
OWN = {"_attention", "_device", "_ids", "_num_blocks", "_indices"}
# What files import of transformers besides PreTrainedModel, or use as its attributes. Two may go below the top level.
INTERNAL = {"internals", "dispatch"}
PUBLIC = {
    "branching": {"__version__"},
    "callbacks": {"Trainer", "TrainerCallback"},
    "env": {"AutoModelForCausalLM"},
    "image_costs": {"AutoImageProcessor", "AutoModelForImageTextToText", "AutoProcessor"},
    "models": {
        "AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer", "CONFIG_MAPPING",
        "GgufConfig", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "__version__",
    },
    "parity": {"__version__"},
    "row_calls": {"__version__"},
    "run_ahead": {"Trainer"},
    "trl": {"Trainer"},
    "verify": {"utils"},
}  # fmt: skip
BELOW = {
    "internals": {"transformers.modeling_layers", "transformers.utils.output_capturing"},
    "dispatch": {"transformers.masking_utils", "transformers.modeling_utils"},
    "models": {"transformers.utils"},  # where models' files are, hub or not
}


def private_names(source: ast.AST) -> set[str]:
    """Names with one leading underscore read from anything but ``self``, as attributes or as strings."""
    own = {node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return {name for name in found if re.fullmatch(r"_[a-z]\w*", name)} - own - OWN


def of_transformers(source: ast.AST) -> tuple[set[str], set[str]]:
    """Names of its top level that a file uses, and modules below it that it imports from."""
    top, below = set(), set()
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            if node.module == "transformers":
                top |= {name.name for name in node.names}
            else:
                below.add(str(node.module))
        elif isinstance(node, ast.Import):
            below |= {name.name for name in node.names if name.name.startswith("transformers.")}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "transformers":
            top.add(node.attr)
    return top - {"PreTrainedModel"}, below


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_two_files_touch_internals(file: Path) -> None:
    source = ast.parse(file.read_text(encoding="utf-8"))
    new = private_names(source) - PRIVATE.get(file.stem, set())
    assert not new, (
        f"{file.name} reads {', '.join(sorted(new))}: they belong in internals.py, with a probe and an entry"
    )
    top, below = of_transformers(source)
    new = below - BELOW.get(file.stem, set())
    assert not new, f"{file.name} imports {', '.join(sorted(new))}: internals of transformers belong in internals.py"
    if file.stem not in INTERNAL:
        new = top - PUBLIC.get(file.stem, set())
        assert not new, f"{file.name} uses {', '.join(sorted(new))} of transformers: list it here"


def test_the_lists_are_no_longer_than_needed_and_each_name_is_tested() -> None:
    sources = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    for name, listed in PRIVATE.items():
        assert listed == private_names(sources[name]), name
        tested = {
            word for entry in PROBES if entry.user.split(".")[0] == name for word in re.findall(r"\w+", entry.name)
        }
        assert listed - {"_asdict"} - COMPARED <= tested, f"{name}: {listed - tested - COMPARED} have no entry"
    for name, listed in PUBLIC.items():
        assert listed == of_transformers(sources[name])[0], name
    for name, listed in BELOW.items():
        assert listed == of_transformers(sources[name])[1], name


@parameterized.expand(
    [
        ("model._tied_weights_keys", {"_tied_weights_keys"}, (set(), set())),
        ("getattr(module, '_gradient_checkpointing_func')", {"_gradient_checkpointing_func"}, (set(), set())),
        ("self._layers", set(), (set(), set())),
        ("from transformers.cache_utils import Cache", set(), (set(), {"transformers.cache_utils"})),
        ("import transformers.cache_utils", set(), (set(), {"transformers.cache_utils"})),
        ("from transformers import Cache", set(), ({"Cache"}, set())),
        ("transformers.Cache()", set(), ({"Cache"}, set())),
    ]
)
def test_touches_are_noticed(code: str, private: set[str], used: tuple[set[str], set[str]]) -> None:
    assert (private_names(ast.parse(code)), of_transformers(ast.parse(code))) == (private, used)
