"""Dataset rows to packed rows: tokenised, raw text, or conversations.

A dataset row has a prompt, and either ``chosen`` and ``rejected`` or a list of any number of ``answers``:

===============  ==========================================  ============================================
kind             columns                                     values
===============  ==========================================  ============================================
tokenised        prompt_ids, chosen_ids, rejected_ids        lists of token ids
                 prompt_ids, answer_ids                      ... and a list of lists
raw text         prompt, chosen, rejected                    strings
                 prompt, answers                             ... and a list of strings
conversations    prompt, chosen, rejected (or answers)       lists of {"role": ..., "content": ...}
no prompt        chosen, rejected (or answers)               whole dialogues; their common turns are the prompt
===============  ==========================================  ============================================

An "answer" here is a "completion" elsewhere: ``completions`` and ``completion_ids`` are read as ``answers`` and
``answer_ids``. Conversations may also have the columns ``tools`` and ``chat_template_kwargs``, which are passed to the
chat template.

With a processor, rows of the last three kinds may have a column ``images`` (a list), or ``image``: those of the prompt.
A text has the processor's own marks where they stand, messages parts ``{"type": "image"}``, or nothing.

Tokenisation follows TRL's DPOTrainer: the prompt ends where the ids of prompt and prompt + answer diverge, and raw
answers end with the tokenizer's EOS.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from flexpatch.errors import FlexpatchError, first_line
from flexpatch.processing import Processed, images_of_row, process, split_processor
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Layout, Tree, lay_out

# Ends the prompt of HH-RLHF rows, which are whole dialogues in plain text.
TURN = "\n\nAssistant:"

IDS = (Sequence, np.ndarray, Tensor)

log = logging.getLogger(__name__)


class Collator:
    """Make trees, layouts and rows of dataset rows. As a ``collate_fn`` it makes one packed row of a batch.

    An "answer" is what others call a completion; the columns ``completions`` and ``completion_ids`` are synonyms.

    Args:
        tokenizer: A tokenizer of transformers, or for rows with images a processor; ``None`` if all rows are tokenised.
        max_length: Longest prompt + answer, in tokens; ``None`` for no limit.
        on_long: ``"error"`` refuses a longer prompt + answer, ``"truncate"`` cuts the answer's end. A prompt that
            alone fills ``max_length`` is an error in both cases.

    Raises:
        FlexpatchError: For a ``max_length`` below 1, or an unknown ``on_long``.
    """

    def __init__(
        self, tokenizer: Any = None, *, max_length: int | None = None, on_long: Literal["error", "truncate"] = "error"
    ) -> None:
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise FlexpatchError(f"max_length={max_length!r}; expected at least 1, or None")
        if on_long not in ("error", "truncate"):
            raise FlexpatchError(f"on_long={on_long!r}; expected 'error' or 'truncate'")
        self.tokenizer, self.processor = split_processor(tokenizer)
        self.max_length = max_length
        self.on_long = on_long
        self._warned = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Rows:
        """Pack dataset rows into one row.

        Args:
            examples: Dataset rows in the forms above, at least one. Error messages number them from 0.

        Returns:
            Rows with B = 1, on the CPU.

        Raises:
            FlexpatchError: For a dataset row that cannot be used. The message names the row and the fault.
        """
        return build_rows([[self.layout(example, i) for i, example in enumerate(examples)]])

    def layout(self, example: Mapping[str, Any], sample: int | str = 0) -> Layout:
        """Lay one dataset row out in depth-first order.

        Args:
            example: A dataset row in one of the forms above.
            sample: Name of the row in error messages.

        Returns:
            The layout. Its ``len`` is the length that :func:`flexpatch.pack` needs.
        """
        return lay_out(self.tree(example, sample), sample)

    def tree(self, example: Mapping[str, Any], sample: int | str = 0) -> Tree:
        """Tokenise the prompt and answers of one dataset row.

        Args:
            example: A dataset row in one of the forms above.
            sample: Name of the row in error messages.

        Returns:
            The prompt with one leaf for each answer.

        Raises:
            FlexpatchError: For missing or malformed columns, empty prompts or answers, or too many tokens.
        """
        if not isinstance(example, Mapping):
            raise FlexpatchError(f"sample {sample}: expected a dict of columns, got {type(example).__name__}")
        images, tensors = images_of_row(example, sample), None
        if images and self.processor is None:
            raise FlexpatchError(f"sample {sample}: its images need Collator(processor): AutoProcessor makes one")
        if images and "prompt_ids" in example:
            raise FlexpatchError(f"sample {sample}: the images of a tokenised row go into flexpatch.Tree(images=...)")
        if "prompt_ids" in example:
            prompt_ids = _column(example, "prompt_ids", IDS, sample)
            answer_ids = _answers(example, "_ids", sample)
        else:
            try:
                prompt_ids, answer_ids, tensors = self._tokenise(example, images, sample)
            except RecursionError as error:
                raise FlexpatchError(f"sample {sample}: its columns are nested too deeply") from error
        if self.max_length is not None and all(map(_sized, (prompt_ids, *answer_ids))):
            answer_ids = [self._fit(prompt_ids, answer, sample) for answer in answer_ids]
        return Tree.of(prompt_ids, *answer_ids, images=tensors)

    def _tokenise(self, example: Mapping[str, Any], images: list[Any] | None, sample: int | str) -> Processed:
        if self.tokenizer is None:
            raise FlexpatchError(f"sample {sample}: a row without 'prompt_ids' needs Collator(tokenizer)")
        answers = _answers(example, "", sample)
        if "prompt" in example:
            prompt = _column(example, "prompt", (str, list), sample)
        else:
            prompt, answers = _split_prompt(answers, sample)
        for name, value in [("the prompt", prompt), *((f"answer {i}", answer) for i, answer in enumerate(answers))]:
            if not value:
                raise FlexpatchError(f"sample {sample}: {name} is empty")
            if type(value) is not type(prompt):
                raise FlexpatchError(
                    f"sample {sample}: {name} is {type(value).__name__}, the prompt {type(prompt).__name__}"
                )
        try:
            template = _template_arguments(example)
            if self.processor is not None and (images is not None or not isinstance(prompt, str)):
                return process(self.processor, prompt, answers, images or [], template)
            prompt_ids = self._encode(prompt, prompt=True, **template)
            whole = [self._encode(prompt + answer, prompt=False, **template) for answer in answers]
        except Exception as error:  # tokenizers and chat templates raise all kinds of errors
            tool = "tokenizer" if self.processor is None else "processor"
            raise FlexpatchError(
                f"sample {sample}: the {tool} failed: {type(error).__name__}: {first_line(error)}"
            ) from error
        stop = min(_shared(prompt_ids, ids) for ids in whole)
        if stop < len(prompt_ids) and not self._warned:
            self._warned = True
            log.warning(
                "sample %s: tokenised alone, the prompt is no prefix of prompt + answer; answers start where they "
                "diverge, %d tokens before the prompt's end (logged once)", sample, len(prompt_ids) - stop
            )  # fmt: skip
        return Processed(prompt_ids[:stop], [ids[stop:] for ids in whole], None)

    def _encode(self, text: str | list[dict[str, str]], prompt: bool, **template: Any) -> list[int]:
        if isinstance(text, str):
            eos = self.tokenizer.eos_token or ""
            ended = prompt or text.endswith(eos)
            return self.tokenizer(text if ended else text + eos)["input_ids"]
        ids = self.tokenizer.apply_chat_template(text, add_generation_prompt=prompt, return_dict=True, **template)
        if not isinstance(ids["input_ids"], list) or not all(isinstance(i, int) for i in ids["input_ids"]):
            raise ValueError(
                "with the row's chat_template_kwargs the chat template does not return a list of token ids"
            )
        return ids["input_ids"]

    def _fit(self, prompt: Sequence[int], answer: Sequence[int], sample: int | str) -> Sequence[int]:
        assert self.max_length is not None
        if len(prompt) >= self.max_length:
            raise FlexpatchError(
                f"sample {sample}: the prompt alone has {len(prompt)} tokens, max_length is {self.max_length}"
            )
        if len(prompt) + len(answer) > self.max_length and self.on_long == "error":
            raise FlexpatchError(
                f"sample {sample}: prompt + answer have {len(prompt)} + {len(answer)} tokens, max_length is "
                f"{self.max_length}; raise it, or pass on_long='truncate' to cut answers"
            )
        return answer[: self.max_length - len(prompt)]


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts, id lists or message lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _template_arguments(example: Mapping[str, Any]) -> dict[str, Any]:
    """Read a conversation's arguments for the chat template from its row, as TRL does."""
    tools = example.get("tools")
    return {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }


def _sized(ids: Any) -> bool:
    """Return whether ids have a length. Arrays without a dimension have none; the tree refuses them."""
    return getattr(ids, "ndim", 1) > 0


def _column(example: Mapping[str, Any], name: str, kind: Any, sample: int | str) -> Any:
    if name not in example:
        has = ", ".join(f"{column!r:.40}" for column in list(example)[:20]) or "none"
        has += " ..." if len(example) > 20 else ""
        raise FlexpatchError(f"sample {sample}: no column '{name}'; it has {has}")
    if not isinstance(example[name], kind):
        raise FlexpatchError(f"sample {sample}: column '{name}' holds {type(example[name]).__name__}")
    return example[name]


def _answers(example: Mapping[str, Any], suffix: str, sample: int | str) -> list[Any]:
    """Read the answers of a row: a list in one column, or chosen and rejected."""
    synonyms = ("answer_ids", "completion_ids") if suffix else ("answers", "completions")
    given = [name for name in synonyms if name in example]
    if len(given) > 1:
        raise FlexpatchError(f"sample {sample}: columns '{given[0]}' and '{given[1]}' are synonyms; expected one")
    kind = IDS if suffix else (str, list)
    if given:
        answers = list(_column(example, given[0], list, sample))
        if not answers:
            raise FlexpatchError(f"sample {sample}: column '{given[0]}' holds no answer")
        for i, answer in enumerate(answers):
            if not isinstance(answer, kind):
                raise FlexpatchError(f"sample {sample}: answer {i} is {type(answer).__name__}")
        return answers
    return [_column(example, name + suffix, kind, sample) for name in ("chosen", "rejected")]


def _split_prompt(answers: list[Any], sample: int | str) -> tuple[Any, list[Any]]:
    """Cut whole dialogues into prompt and answers.

    The prompt of messages is the common messages. The prompt of plain text ends with the last common turn.
    """
    if len(kinds := sorted({type(answer).__name__ for answer in answers})) > 1:
        raise FlexpatchError(f"sample {sample}: the answers are {' and '.join(reversed(kinds))}; expected one kind")
    shared = min(_shared(answers[0], answer) for answer in answers)
    if isinstance(answers[0], str):
        stop = answers[0].rfind(TURN, 0, shared) + len(TURN)
        if stop < len(TURN):
            raise FlexpatchError(
                f"sample {sample}: no column 'prompt', and the texts share no turn that ends in {TURN!r}"
            )
    else:
        # An answer is at least one message, also when two dialogues are equal.
        stop = min(shared, *(len(answer) - 1 for answer in answers))
    return answers[0][:stop], [answer[stop:] for answer in answers]
