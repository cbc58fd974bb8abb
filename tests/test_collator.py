"""Dataset rows to trees: every form of row, the same ids as TRL's DPOTrainer, and errors that name the row."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.forests import runs
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_trees import same, trl
from parameterized import parameterized

from flexpatch import Collator, FlexpatchError, Tree, read_jsonl

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
PAIR = dict(prompt="The cat sat", chosen=" on the mat.", rejected=" on the dog.")
USER, MAT, DOG, ROBOT = (
    {"role": role, "content": content}
    for role, content in [
        ("user", "Where is the cat?"),
        ("assistant", "On the mat."),
        ("assistant", "On the dog."),
        ("robot", ""),
    ]
)


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def sequences(tree: Tree) -> list[list[int]]:
    """Prompt + answer of every answer."""
    return [[*tree.ids, *child.ids] for child in tree.children]


def test_tokenised_rows() -> None:
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    assert same(Collator().tree(pair), Tree.of([1, 2], [3], [4, 5]))
    many = {"prompt_ids": [1, 2], "answer_ids": [[3], [4, 5], [6]]}
    assert same(Collator().tree(many), Tree.of([1, 2], [3], [4, 5], [6]))


def test_raw_text_ends_with_one_eos() -> None:
    tree = Collator(TOKENIZER).tree(PAIR)
    assert list(tree.ids) == ids("The cat sat")
    assert [TOKENIZER.decode(child.ids) for child in tree.children] == [" on the mat.<|end|>", " on the dog.<|end|>"]
    ended = dict(PAIR, chosen=" on the mat.<|end|>", rejected=" on the dog.<|end|>")
    assert same(Collator(TOKENIZER).tree(ended), tree)


def test_any_number_of_answers() -> None:
    answers = [" on the mat.", " on the log.", " on the dog.", " is Paris."]
    tree = Collator(TOKENIZER).tree({"prompt": "The cat sat", "answers": answers})
    assert sequences(tree) == [[*ids("The cat sat" + answer), EOS] for answer in answers]
    assert len(Collator(TOKENIZER).tree({"prompt": "The cat", "answers": [" sat"]}).children) == 1


def test_completions_are_answers() -> None:
    texts = [" on the mat.", " on the dog."]
    collator = Collator(TOKENIZER)
    by_answers = collator.tree({"prompt": "The cat sat", "answers": texts})
    assert same(collator.tree({"prompt": "The cat sat", "completions": texts}), by_answers)
    dialogues = [[USER, MAT], [USER, DOG]]
    assert same(collator.tree({"completions": dialogues}), collator.tree({"answers": dialogues}))
    ids_alone = {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6]]}
    assert same(Collator().tree(ids_alone), Tree.of([1, 2], [3], [4, 5], [6]))


def test_conversations() -> None:
    tree = Collator(TOKENIZER).tree({"prompt": [USER], "chosen": [MAT], "rejected": [DOG]})
    assert TOKENIZER.decode(tree.ids) == "<|user|>Where is the cat?<|end|><|assistant|>"
    assert [TOKENIZER.decode(child.ids) for child in tree.children] == ["On the mat.<|end|>", "On the dog.<|end|>"]


def test_whole_conversations() -> None:
    collator = Collator(TOKENIZER)
    with_prompt = collator.tree({"prompt": [USER, MAT, USER], "chosen": [MAT], "rejected": [DOG]})
    whole = collator.tree({"chosen": [USER, MAT, USER, MAT], "rejected": [USER, MAT, USER, DOG]})
    assert same(whole, with_prompt)
    # Also when both are the same, or one begins the other: an answer keeps its last message.
    assert same(
        collator.tree({"answers": [[USER, MAT], [USER, MAT]]}),
        collator.tree({"prompt": [USER], "answers": [[MAT], [MAT]]}),
    )
    assert same(
        collator.tree({"answers": [[USER, MAT], [USER, MAT, USER, DOG]]}),
        collator.tree({"prompt": [USER], "answers": [[MAT], [MAT, USER, DOG]]}),
    )


def test_whole_dialogues_as_text() -> None:
    """HH-RLHF: the prompt ends with the last turn that both share, not where the replies' letters part."""
    shared = "\n\nHuman: What is the answer?\n\nAssistant: The cat.\n\nHuman: Is it?\n\nAssistant:"
    tree = Collator(TOKENIZER).tree({"chosen": shared + " The cat sat.", "rejected": shared + " The dog sat."})
    assert TOKENIZER.decode(tree.ids) == shared
    assert [TOKENIZER.decode(child.ids) for child in tree.children] == [
        " The cat sat.<|end|>",
        " The dog sat.<|end|>",
    ]


@parameterized.expand(
    [
        ("raw text", PAIR),
        ("answers end in EOS", dict(PAIR, chosen=" on the mat.<|end|>")),
        ("tokens merge over the prompt's end", dict(prompt="The ca", chosen="t sat", rejected="pital")),
        ("tokens merge in one answer", dict(prompt="The ca", chosen="t sat", rejected=" is Paris")),
        ("tokens merge in the other answer", dict(prompt="The ca", chosen=" is Paris", rejected="t sat")),
        ("a prompt that ends in a space", dict(prompt="The cat sat ", chosen="on the mat.", rejected="on the log.")),
        ("conversation", dict(prompt=[USER], chosen=[MAT], rejected=[DOG])),
        ("turns", dict(prompt=[USER, MAT, USER], chosen=[MAT, USER, DOG], rejected=[DOG])),
    ]
)
def test_ids_are_trls(_name: str, row: dict[str, Any]) -> None:
    expected = trl(TOKENIZER, row)
    assert same(Collator(TOKENIZER).tree(row), expected)
    assert not same(Collator(TOKENIZER).tree(dict(row, rejected=row["chosen"])), expected)


def test_ids_are_trls_when_the_template_thinks_ahead() -> None:
    """A template whose generation prompt is no beginning of the whole conversation, as in Gemma 4."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think></think>{% endif %}"
    row = dict(prompt=[USER], chosen=[MAT], rejected=[DOG])
    tree = Collator(tokenizer).tree(row)
    assert same(tree, trl(tokenizer, row))
    assert same(tree, Collator(TOKENIZER).tree(row))


def test_merges_over_the_boundary_keep_the_whole_text(caplog: pytest.LogCaptureFixture) -> None:
    row = dict(prompt="The ca", chosen="t sat", rejected="pital")
    assert ids("The ca") != ids("The cat sat")[: len(ids("The ca"))]
    collator = Collator(TOKENIZER)
    with caplog.at_level(logging.WARNING, "flexpatch"):
        tree = collator.tree(row, 7)
        collator.tree(row, 8)
    assert sequences(tree) == [[*ids("The cat sat"), EOS], [*ids("The capital"), EOS]]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["sample 7"]


def test_max_length() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
    assert same(Collator(max_length=5).tree(row), Tree.of([1, 2], [3, 4, 5], [6]))
    assert same(Collator(max_length=4, on_long="truncate").tree(row), Tree.of([1, 2], [3, 4], [6]))
    text = Collator(TOKENIZER, max_length=len(ids("The cat sat")) + 2, on_long="truncate").tree(PAIR)
    assert [len(child.ids) for child in text.children] == [2, 2]


def test_a_batch_is_one_packed_row() -> None:
    collator = Collator(TOKENIZER)
    rows = collator([PAIR, {"prompt_ids": [5], "answer_ids": [[6], [7], [8]]}])
    assert len(rows.input_ids) == 1
    assert rows.sample_of_answer.tolist() == [0, 0, 1, 1, 1]
    layout = collator.layout(PAIR)
    assert rows.tokens == len(layout) + 4
    # " on the mat." and " on the dog." share " on the".
    assert len(layout) < sum(len(node.ids) for node, _, _ in runs(collator.tree(PAIR)))


@parameterized.expand(
    [
        ("no dict", ["a"], "expected a dict of columns, got list"),
        ("no column", {"prompt": "a", "chosen": "b"}, "no column 'rejected'; it has 'prompt', 'chosen'"),
        ("no columns", {}, "no column 'chosen'; it has none"),
        ("no ids", {"prompt_ids": [1], "chosen": "b"}, "no column 'chosen_ids'"),
        ("wrong prompt", dict(PAIR, prompt=3), "column 'prompt' holds int"),
        ("wrong answer", dict(PAIR, chosen=None), "column 'chosen' holds NoneType"),
        ("wrong answers", {"prompt": "a", "answers": "b"}, "column 'answers' holds str"),
        ("wrong ids", {"prompt_ids": 1, "answer_ids": [[1]]}, "column 'prompt_ids' holds int"),
        ("no answers", {"prompt": "a", "answers": []}, "column 'answers' holds no answer"),
        ("no completions", {"prompt": "a", "completions": []}, "column 'completions' holds no answer"),
        (
            "answers and completions",
            {"prompt": "a", "answers": ["b"], "completions": ["b"]},
            "columns 'answers' and 'completions' are synonyms; expected one",
        ),
        ("empty prompt", dict(PAIR, prompt=""), "the prompt is empty"),
        ("empty answer", dict(PAIR, rejected=""), "answer 1 is empty"),
        ("empty prompt ids", {"prompt_ids": [], "answer_ids": [[1]]}, "the prompt is empty"),
        ("empty answer ids", {"prompt_ids": [1], "answer_ids": [[1], []]}, "answer 1 is empty"),
        ("nothing shared", {"chosen": [USER], "rejected": [MAT]}, "the prompt is empty"),
        ("no shared turn", {"chosen": "a\n\nAssistant: b", "rejected": "c\n\nAssistant: d"}, "share no turn that ends"),
        ("reply missing", {"answers": ["a\n\nAssistant:", "a\n\nAssistant: b"]}, "answer 0 is empty"),
        ("text and messages", dict(PAIR, chosen=[MAT]), "answer 0 is list, the prompt str"),
        ("text and messages, no prompt", {"answers": ["a", [MAT]]}, "the answers are str and list"),
        ("numbers", {"prompt": "a", "answers": [1, 2]}, "answer 0 is int"),
        ("numbers, no prompt", {"answers": [1, 2]}, "answer 0 is int"),
        ("flat ids", {"prompt_ids": [1], "answer_ids": [2, 3]}, "answer 0 is int"),
        (
            "tokenizer fails",
            dict(prompt=[ROBOT], chosen=[MAT], rejected=[DOG]),
            "the tokenizer failed: .*: unknown role",
        ),
        ("prompt too long", dict(PAIR, prompt="The cat" * 60), "the prompt alone has 120 tokens, max_length is 100"),
        ("ids that are one", {"prompt_ids": np.array(5), "answer_ids": [[1]]}, "the prompt must be a flat list"),
        (
            "many columns",
            {"a" * 99: 1} | {str(i): 1 for i in range(99)},
            "no column 'chosen'; it has 'a{39}, .* [.]{3}$",
        ),
        ("answer too long", dict(PAIR, chosen=" cat" * 120), r"have 3 \+ 121 tokens, max_length is 100; raise it"),
    ]
)
def test_refuses(_name: str, row: Any, message: str) -> None:
    with pytest.raises(FlexpatchError, match=f"^sample 3: .*{message}"):
        Collator(TOKENIZER, max_length=100).layout(row, 3)
    with pytest.raises(FlexpatchError, match=f"^sample 1: .*{message}"):
        Collator(TOKENIZER, max_length=100)([PAIR, row])


def test_refuses_settings() -> None:
    with pytest.raises(FlexpatchError, match="sample 0: a row without 'prompt_ids' needs Collator"):
        Collator().tree(PAIR)
    with pytest.raises(FlexpatchError, match="on_long='drop'; expected 'error' or 'truncate'"):
        Collator(on_long="drop")  # type: ignore[arg-type]
    for length in (0, 2.5, "9"):
        with pytest.raises(FlexpatchError, match=f"max_length={length!r}; expected at least 1, or None"):
            Collator(max_length=length)  # type: ignore[arg-type]
    # Cutting answers does not help a prompt that fills the row.
    with pytest.raises(FlexpatchError, match="sample 0: the prompt alone has 2 tokens, max_length is 2"):
        Collator(max_length=2, on_long="truncate").tree({"prompt_ids": [1, 2], "answer_ids": [[3]]})


def gzipped(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


LINES = '{"prompt": "ä"}\n\n  \n{"prompt": "b"}'


@pytest.mark.parametrize(("name", "content"), [("plain.jsonl", LINES.encode()), ("packed.jsonl.gz", gzipped(LINES))])
def test_read_jsonl(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read_jsonl(path) == read_jsonl(str(path)) == [{"prompt": "ä"}, {"prompt": "b"}]


MANY = "".join(json.dumps({"prompt": str(i**9)}) + "\n" for i in range(2000))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"a": 1}\n\n{"a": }\n', ", line 3: Expecting value"),
        ("list.jsonl", b'{"a": 1}\n[1]\n', ", line 2: expected a JSON object, got list"),
        ("latin.jsonl", '{"a": "ä"}'.encode("latin-1"), ", line 1: 'utf-8' codec"),
        ("latin.jsonl", b'{"a": 1}\n{"a": 2}\n' + '{"a": "ä"}\n'.encode("latin-1"), ", line 3: 'utf-8' codec"),
        ("deep.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 10**5, ", line 2: nested too deeply"),
        ("bom.jsonl", b'{"a": 1}\n\xef\xbb\xbf{}', ", line 2: Unexpected UTF-8 BOM"),
        ("empty.jsonl", b"", " holds no rows"),
        ("blank.jsonl", b"\n \n", " holds no rows"),
        ("empty.jsonl.gz", gzipped(""), " holds no rows"),
        ("cut.jsonl.gz", gzipped(MANY)[:-2000], r", line \d+: Compressed file ended"),
        ("plain.jsonl.gz", b'{"a": 1}\n', ", line 1: Not a gzipped file"),
        ("damaged.jsonl.gz", gzipped(MANY)[:100] + b"\xff" * 100 + gzipped(MANY)[200:], r", line \d+: "),
    ],
)
def test_read_jsonl_refuses(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexpatchError, match=f"{name}{message}"):
        read_jsonl(tmp_path / name)


def test_read_jsonl_passes_on_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


@parameterized.expand([("numpy", np.array), ("torch", torch.tensor)])
def test_ids_as_arrays(_name: str, array: Any) -> None:
    """Rows of a dataset in numpy or torch format."""
    tree = Collator(max_length=4).tree(
        dict(prompt_ids=array([1, 2]), chosen_ids=array([3]), rejected_ids=array([4, 5]))
    )
    assert same(tree, Tree.of([1, 2], [3], [4, 5]))


@parameterized.expand([("a list", [{"name": "find"}]), ("json", '[{"name": "find"}]')])
def test_columns_for_the_chat_template(_name: str, tools: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] }}{{ mood }}" + tokenizer.chat_template
    row = dict(prompt=[USER], chosen=[MAT], rejected=[DOG], tools=tools, chat_template_kwargs={"mood": "glad"})
    tree = Collator(tokenizer).tree(row)
    assert tokenizer.decode(tree.ids).startswith("findglad")
