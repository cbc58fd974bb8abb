"""Any dataset row, any file, any command line: used as its definition says, or refused by name and without a traceback.

tests/test_fuzz.py says how to run more of them.
"""

import contextlib
import gzip
import importlib
import io
import itertools
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.fuzzing import (
    FOLDER,
    SCREEN,
    fuzz,
    good_ids,
    json_values,
    mostly,
    odd_ids,
    refused,
    same,
    temporary,
    texts,
)
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_trees import same as same_trees
from helpers.trl_trees import trl
from hypothesis import strategies as st
from parameterized import parameterized
from torch import Tensor

import flexpatch
from flexpatch import Collator, FlexpatchError, Tree, estimate, lay_out, read_jsonl, reference, verify
from flexpatch.errors import first_line
from flexpatch.models import load_model, tiny_model

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = make_tokenizer()
COLLATOR = Collator(TOKENIZER, max_length=200)

# Dataset rows --------------------------------------------------------------------------------------------------

id_lists = st.lists(good_ids, min_size=1, max_size=3)
token_columns = st.fixed_dictionaries(
    {"prompt_ids": mostly(good_ids, odd_ids)},
    optional=dict(chosen_ids=mostly(good_ids, odd_ids), rejected_ids=good_ids, answer_ids=mostly(id_lists, odd_ids)),
)
pairs_of_ids = st.fixed_dictionaries(
    dict(prompt_ids=good_ids, chosen_ids=good_ids, rejected_ids=mostly(good_ids, odd_ids))
)


@fuzz(500, row=mostly(pairs_of_ids, token_columns), max_length=st.none() | st.integers(3, 12), cut=st.booleans())
def test_tokenised_rows(row: dict[str, Any], max_length: int | None, cut: bool) -> bool:
    collator = Collator(max_length=max_length, on_long="truncate" if cut else "error")
    if refused(lambda: collator.layout(row, 7), "sample 7: "):
        return False
    prompt = [int(token) for token in row["prompt_ids"]]
    answers = row["answer_ids"] if "answer_ids" in row else [row["chosen_ids"], row["rejected_ids"]]
    # What is cut is not looked at.
    fit = [[int(token) for token in answer[: (max_length or 10**9) - len(prompt)]] for answer in answers]
    assert cut or all(len(a) == len(b) for a, b in zip(fit, answers, strict=True))
    layout, true = collator.layout(row, 7), lay_out(Tree.of(prompt, *fit))
    assert layout.ids.tolist() == true.ids.tolist() and layout.ends.tolist() == true.ends.tolist()
    assert layout.answer_lengths == list(map(len, fit))
    return True


roles = st.sampled_from(["user", "assistant", "system", "robot", ""])
messages = st.fixed_dictionaries(dict(role=roles, content=texts))
text = st.text("ab \u00e9", max_size=6)
good_messages = st.fixed_dictionaries(dict(role=st.sampled_from(["user", "assistant"]), content=text))
good_texts = st.text("The cat sat\u00e9", min_size=1, max_size=12)
good_talks = st.lists(good_messages, min_size=1, max_size=3)
kinds = [good_texts, good_talks, texts, st.lists(messages, max_size=3), json_values]


def columns(values: Any) -> Any:
    optional = dict(answers=st.lists(values, max_size=3) | json_values, tools=json_values)
    optional |= dict(chat_template_kwargs=json_values | template_arguments)
    return st.fixed_dictionaries(dict(prompt=values, chosen=values, rejected=values), optional=optional) | (
        st.fixed_dictionaries({}, optional=dict(prompt=values, chosen=values, rejected=values, **optional))
    )


template_arguments = st.dictionaries(
    st.sampled_from(
        ["tokenize", "return_tensors", "padding", "truncation", "max_length", "chat_template", "return_dict", "tools",
         "add_generation_prompt", "continue_final_message", "tokenizer_kwargs", "mood", "documents"]
    ),
    st.sampled_from([True, False, None, "pt", "np", "max_length", 3, 0, "{{ messages }}", "{% for", {}, []]),
    max_size=2,
)  # fmt: skip
good_rows = st.one_of(
    *(st.fixed_dictionaries(dict(prompt=good, chosen=good, rejected=good)) for good in (good_texts, good_talks)),
    st.fixed_dictionaries(dict(prompt=good_talks, answers=st.lists(good_talks, min_size=1, max_size=3))),
    st.fixed_dictionaries(dict(prompt=good_texts, chosen=texts, rejected=good_texts)),
)
texts_or_messages = st.one_of(*map(columns, kinds), columns(st.one_of(*kinds)))
dialogues = st.builds(
    lambda shared, a, b: {"chosen": shared + "\n\nAssistant:" + a, "rejected": shared + "\n\nAssistant:" + b},
    texts, good_texts, texts,
)  # fmt: skip


@fuzz(500, row=mostly(good_rows, texts_or_messages | dialogues | json_values))
def test_rows_of_text_and_messages(row: Any) -> bool:
    """Those with a prompt and a pair give TRL's ids."""
    if refused(lambda: COLLATOR.layout(row, 7), "sample 7: "):
        return False
    tree = COLLATOR.tree(row, 7)
    assert all(len(tree.ids) + len(child.ids) <= 200 for child in tree.children)
    if "prompt" in row and "answers" not in row and not row.get("tools") and not row.get("chat_template_kwargs"):
        assert same_trees(tree, trl(TOKENIZER, row))
    return True


def test_rows_with_arguments_that_change_what_a_template_returns() -> None:
    """Found by the test above: tensors and cut lists came back where ids were expected."""
    talk = [{"role": "user", "content": "Cat?"}]
    row = dict(
        prompt=talk, chosen=[{"role": "assistant", "content": "a"}], rejected=[{"role": "assistant", "content": "b"}]
    )
    for arguments in ({"return_tensors": "pt"}, {"tokenize": False}):
        with pytest.raises(FlexpatchError, match=r"^sample 7: the tokenizer failed"):
            COLLATOR.layout(row | {"chat_template_kwargs": arguments}, 7)


# Files --------------------------------------------------------------------------------------------------


odd_lines = st.sampled_from(
    [
        *(b"", b" ", b"\xef\xbb\xbf{}", b"{}{}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b"\xff", b"\x00"),
        *(b"[" * 10**5, b'{"a": ' + b"[" * 10**4 + b"]" * 10**4 + b"}", b'{"a": ' + b"9" * 5000 + b"}", b"{'a': 1}"),
        *(b"\xc2\x85", '{"a": 1}'.encode("utf-16"), b'{"a": 1}\r', b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}'),
        *(b'{"a": 1, "a": 2}', b'{"a": 1}\r{"a": 2}'),
    ]
)
lines = st.one_of(
    st.dictionaries(texts, json_values, max_size=3).map(lambda row: json.dumps(row).encode()),
    st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3).map(
        lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    json_values.map(lambda value: json.dumps(value).encode()),
    odd_lines,
    st.binary(max_size=20),
)
good_lines = st.dictionaries(st.text(max_size=3), st.none() | st.text(max_size=9) | st.integers(), max_size=3).map(
    lambda row: json.dumps(row).encode()
)


def rows_of(content: bytes) -> list[Any] | int | str:
    """By definition: the rows, or the number of the first bad line, or the first bad row of an array."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.startswith(b"\xff\xfe"):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeDecodeError:
            return 1
    if content.lstrip().startswith(b"["):
        return array_of(content)
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
            row = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            return number
        if not isinstance(row, dict):
            return number
        rows += [row] if text else []
    return rows


def array_of(content: bytes) -> list[Any] | int | str:
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    except json.JSONDecodeError as error:
        return error.lineno
    except (ValueError, RecursionError):  # numbers of too many digits
        return 1
    return next((f"row {number}" for number, row in enumerate(rows) if not isinstance(row, dict)), rows)


def reads_as(path: Path, true: list[Any] | int | str) -> bool:
    where = f"line {true}" if isinstance(true, int) else true
    names = f", {where}: " if isinstance(where, str) else "holds no rows"
    if refused(lambda: read_jsonl(path), names):
        assert isinstance(where, str) or not true, "good rows are refused"
        return False
    assert not isinstance(where, str) and same(read_jsonl(path), true)
    return True


marks = st.sampled_from([b""] * 5 + [b"\xef\xbb\xbf"])


@fuzz(
    500,
    content=st.lists(good_lines | lines, max_size=4) | st.lists(good_lines, max_size=3),
    end=st.booleans(),
    mark=marks,
)
def test_json_lines(content: list[bytes], end: bool, mark: bytes) -> bool:
    whole = mark + b"\n".join(content) + b"\n" * end
    return reads_as(temporary("rows.jsonl", whole), rows_of(whole))


@fuzz(
    200,
    rows=mostly(st.lists(good_lines, max_size=3), st.lists(good_lines | lines, max_size=3)),
    space=st.sampled_from([b"", b"\n", b" \n\n"]),
    end=mostly(st.just(b"]"), st.sampled_from([b"", b"]]", b"]\n{}"])),
    mark=marks,
)
def test_json_arrays(rows: list[bytes], space: bytes, end: bytes, mark: bytes) -> bool:
    whole = mark + space + b"[" + (b"," + space).join(rows) + end
    return reads_as(temporary("rows.json", whole), rows_of(whole))


@fuzz(
    300,
    rows=st.lists(good_lines, min_size=1, max_size=30),
    at=st.integers(0, 400),
    cut=st.booleans(),
    new=st.none() | st.binary(max_size=4),
)
def test_damaged_gzip_files(rows: list[bytes], at: int, cut: bool, new: bytes | None) -> bool:
    """A checksum is what they have: whatever is read is what was written."""
    content = b"\n".join(rows)
    packed = gzip.compress(content, mtime=0)
    at %= len(packed)
    damaged = packed if new is None else packed[:at] + new + packed[at + (10**9 if cut else len(new)) :]
    path = temporary("rows.jsonl.gz", damaged)
    if refused(lambda: read_jsonl(path), "rows.jsonl.gz"):
        assert damaged != packed or not rows_of(content)
        return False
    assert same(read_jsonl(path), rows_of(content))
    return True


VALUES = [torch.tensor([-1.5, -2.0]), torch.tensor([-3.25])]


def cached() -> bytes:
    """A reference cache as it is written."""
    path = Path(FOLDER.name) / "written"
    logprobs = torch.cat(VALUES)
    reference.save_file({"logprobs": logprobs}, path, metadata={"blake2b": reference._digest(logprobs)})
    return path.read_bytes()


damage = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=3)


def damaged(content: bytes, changes: list[tuple[int, int]], cut: int | None, within: int | None = None) -> bytes:
    changed = bytearray(content)
    for at, value in changes:
        changed[at % (within or len(content))] = value
    return bytes(changed[: None if cut is None else cut % len(content)])


@fuzz(
    300,
    changes=mostly(damage, st.just([])),
    cut=st.sampled_from([None, None, None, 0, 1, 8, 99, 150]),
    junk=st.none() | st.none() | st.binary(max_size=99),
)
def test_reference_caches(changes: list[tuple[int, int]], cut: int | None, junk: bytes | None) -> bool:
    path = temporary("reference.safetensors", damaged(cached(), changes, cut) if junk is None else junk)
    if refused(lambda: reference._load(path, 3), "reference.safetensors"):
        assert path.read_bytes() != cached()
        return False
    assert torch.equal(reference._load(path, 3), torch.cat(VALUES))
    return True


MODEL = Path(FOLDER.name) / "model"


def saved_model() -> dict[str, bytes]:
    """The files of a small model with its tokenizer, in ``MODEL``."""
    if not MODEL.exists():
        tiny_model("llama", dtype=torch.float32).save_pretrained(MODEL)
        TOKENIZER.save_pretrained(MODEL)
        ORIGINAL.update({path.name: path.read_bytes() for path in MODEL.iterdir()})
    return ORIGINAL


ORIGINAL: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@fuzz(
    12,
    long=1200,
    changes=mostly(st.just([]), damage),
    cut=mostly(st.none(), st.sampled_from([7, 400])),
    junk=mostly(st.none(), st.binary(max_size=99)),
)
def test_headers_of_weights(changes: list[tuple[int, int]], cut: int | None, junk: bytes | None) -> bool:
    """What loads has all of its weights from the file: none is left as a random one."""
    whole = saved_model()["model.safetensors"]
    header = 8 + int.from_bytes(whole[:8], "little")
    (MODEL / "model.safetensors").write_bytes(damaged(whole, changes, cut, header) if junk is None else junk)
    try:
        if refused(lambda: load_model(str(MODEL), torch.float32), "model"):
            return False
        weights = weights_of(load_model(str(MODEL), torch.float32))
    finally:
        (MODEL / "model.safetensors").write_bytes(whole)
    true = weights_of(load_model(str(MODEL), torch.float32))
    values = torch.frombuffer(bytearray(whole[header:]), dtype=torch.float32)
    # A changed offset gives a tensor other values of the file; a name that was changed must not give random ones.
    assert weights.keys() == true.keys()
    assert all(torch.isin(tensor.flatten()[:8], values).all() for tensor in weights.values())
    return True


configurations = st.dictionaries(
    st.sampled_from(
        ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "rope_parameters", "rope_scaling",
         "model_type", "architectures", "dtype", "head_dim", "auto_map", "layer_types", "transformers_weights",
         "num_key_value_heads", "quantization_config", "attention_dropout", "sliding_window", "intermediate_size"]
    ),
    json_values | st.integers(-1, 200),
    max_size=3,
)  # fmt: skip


@fuzz(
    60,
    long=400,
    changes=configurations,
    junk=st.sampled_from([None] * 5 + [b"", b"[]", b"{}", b"\xff", b"null", b"[" * 10**5]),
)
def test_configurations_of_models(changes: dict[str, Any], junk: bytes | None) -> bool:
    whole = saved_model()["config.json"]
    content = json.dumps(json.loads(whole) | changes).encode() if junk is None else junk
    (MODEL / "config.json").write_bytes(content)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            used = not refused(lambda: estimate.model_of(str(MODEL)), "model", "configuration")
            used |= not refused(lambda: flexpatch.apply(load_model(str(MODEL), torch.float32)))
    finally:
        (MODEL / "config.json").write_bytes(whole)
    return used


# Command lines --------------------------------------------------------------------------------------------------


def example(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "examples"))
        return importlib.import_module(name)


def command(main: Callable[[list[str]], Any], arguments: list[str]) -> bool:
    """Runs a command line: exit codes 0 to 2, and what it says fits a screen and is no traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exit:  # argparse
            code = exit.code
    said = err.getvalue()
    assert code in (None, 0, 1, 2), code
    assert "Traceback" not in said
    # argparse repeats what it cannot read.
    given = sum(len(repr(argument)) for argument in arguments)
    assert code != 2 or (0 < len(said) < SCREEN + 2 * given and said.count("\n") <= 24), said
    return code != 2


odd_words = st.sampled_from(
    [
        *(
            "0",
            "1",
            "3",
            "-1",
            "nan",
            "inf",
            "1e9",
            "9" * 30,
            "",
            "x",
            "--",
            "-",
            "auto",
            "cpu",
            "meta",
            "cuda:99",
            "all",
        ),
        *("float32", "dense", "flex", "llama", "/", ".", "--x", "=", "🐱", "a\nb"),
    ]
) | st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=8)


def arguments(first: Any, options: dict[str, list[str]]) -> Any:
    """Command lines: options with values that they take, among them some others, in any order."""
    known = [
        st.tuples(st.just(name), mostly(st.sampled_from(good), odd_words)).map(list) if good else st.just([name])
        for name, good in options.items()
    ]
    extra = mostly(st.just([]), st.lists(st.sampled_from(list(options)) | odd_words, max_size=2))
    lists = st.lists(st.one_of(known), max_size=4)
    return st.builds(
        lambda a, b, c: [a, *(word for some in b for word in some), *c], mostly(first, odd_words), lists, extra
    )


def data_file() -> str:
    pair = dict(prompt_ids=[1, 2], chosen_ids=[3], rejected_ids=[4])
    return str(temporary("pairs.jsonl", "\n".join([json.dumps(pair)] * 3 + ['{"prompt_ids": []}']).encode()))


def filled(given: list[str]) -> list[str]:
    """With paths that are known only when a test runs."""
    saved_model()
    known = dict(DATA=data_file(), MODEL=str(MODEL))
    return [known.get(word, word) for word in given]


ESTIMATE = {
    "--tokenizer": ["MODEL"], "--model": ["8b", "1b", "MODEL"], "--batch-size": ["1", "3"], "--max-length": ["4", "9"],
    "--limit": ["2", "9"], "--skip-bad-rows": [], "--seed": ["0", "7"], "--json": [], "--trust-remote-code": [],
}  # fmt: skip


@fuzz(150, given=arguments(st.just("DATA"), ESTIMATE), skip=st.booleans())
def test_command_line_of_estimate(given: list[str], skip: bool) -> bool:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(FOLDER.name)
        return command(estimate.main, [*filled(given), "--no-plot", *["--skip-bad-rows"] * skip])


VERIFY = {
    "--dtype": ["float32", "float64"], "--device": ["cpu", "auto"], "--compile": [],
    "--backend": ["dense", "auto", "flex"], "--lora": [], "--trust-remote-code": [], "--allow-pickle": [],
    "--gradient-checkpointing": ["reentrant", "non-reentrant"], "--seed": ["0", "7"], "--json": [],
}  # fmt: skip


@fuzz(100, long=1000, given=arguments(st.sampled_from(["llama", "MODEL"]), VERIFY))
def test_command_line_of_verify(given: list[str]) -> bool:
    """Up to the checks themselves, which have tests of their own, and for one model a line."""
    honest = verify._models
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "_models", lambda options: itertools.islice(honest(options), 1))
        patched.setattr(verify, "check_parity", lambda model, **settings: report())
        return command(verify.main, filled(given))


@cache
def report() -> Any:
    return flexpatch.check_parity(tiny_model("llama"))


EXAMPLE = {
    "--shared": [], "--paired": [], "--model": ["MODEL"], "--data": ["DATA"], "--limit": ["3", "30"],
    "--held-out": ["1", "2"], "--skip-bad-rows": [], "--max-length": ["9", "1024"], "--row-tokens": ["64"],
    "--steps": ["2"], "--batch-size": ["2"], "--lr": ["0.1", "1e-4"], "--beta": ["0.1"], "--dtype": ["float32"],
    "--device": ["cpu"], "--seed": ["1"], "--output": ["out"],
}  # fmt: skip


@fuzz(40, long=1000, given=arguments(st.sampled_from(["--shared", "--skip-bad-rows"]), EXAMPLE))
def test_command_line_of_the_example(given: list[str]) -> bool:
    """Up to training, which has tests of its own: reading the model and the data is run."""
    lora_dpo = example("lora_dpo")

    def read(args: Any) -> None:
        name = args.model or str(MODEL)
        tokenizer, _ = lora_dpo.load_tokenizer(name), lora_dpo.load_model(name, torch.float32)
        lora_dpo.read_pairs(args, tokenizer)

    with pytest.MonkeyPatch.context() as patched:
        # Old releases of transformers write a line for every weight that they load.
        patched.setattr("transformers.utils.logging._tqdm_active", False)
        patched.setattr(lora_dpo, "run", read)
        patched.chdir(FOLDER.name)
        return command(lora_dpo.main, filled(given))


turns = st.recursive(
    st.fixed_dictionaries(dict(user=texts, replies=st.lists(st.fixed_dictionaries(dict(text=good_texts)), max_size=3))),
    lambda turn: st.fixed_dictionaries(
        dict(
            user=good_texts,
            replies=st.lists(st.fixed_dictionaries(dict(text=good_texts), optional=dict(then=turn)), max_size=2),
        )
    ),
    max_leaves=3,
)


@fuzz(150, dialogues=st.lists(turns | json_values, max_size=2) | json_values)
def test_files_of_dialogues(dialogues: Any) -> bool:
    tree_example = example("preference_tree")
    path = temporary("dialogues.json", json.dumps(dialogues).encode())
    try:
        trees = tree_example.read_trees(path, TOKENIZER)
    except (ValueError, RecursionError) as error:  # what main() catches
        assert len(first_line(error)) < SCREEN
        return False
    assert len(trees) == len(dialogues)
    return True


@parameterized.expand(
    [
        (test_tokenised_rows, flexpatch.collator, "_answers", lambda answers: answers[::-1]),
        (test_rows_of_text_and_messages, flexpatch.collator, "_shared", lambda shared: max(shared - 1, 0)),
        (test_json_lines, sys.modules[__name__], "read_jsonl", lambda rows: rows[:-1]),
        (test_reference_caches, reference, "_digest", lambda digest: ""),
        (test_command_line_of_estimate, estimate, "read_samples", lambda pair: pair[5]),
    ]
)
def test_the_properties_can_fail(prop: Any, place: Any, name: str, change: Any) -> None:
    honest = getattr(place, name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(place, name, lambda *args, **kwargs: change(honest(*args, **kwargs)))
        assert not prop.holds()
