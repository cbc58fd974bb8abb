"""Dataset rows with images, as TRL's collators for images read them: a processor makes ids and tensors of a prompt.

The row's images stand where its messages, or its text, have places for them; in front of the first message of a user
if no message has one. Answers hold no images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flexpatch.errors import FlexpatchError
from flexpatch.layouts import TYPES

COLUMNS = ("images", "image")
# Names what a processor makes of text (PaliGemma's labels too); all else is of images.
TEXT = ("input_ids", "attention_mask", "labels", *TYPES)


class Processed(NamedTuple):
    """A prompt and its answers.

    Attributes:
        prompt: Token ids, placeholders of images among them.
        answers: Token ids of each answer.
        images: Tensors of the prompt's images; ``None`` if it has none.
    """

    prompt: Sequence[int]
    answers: list[Sequence[int]]
    images: dict[str, Any] | None


def split_processor(given: Any) -> tuple[Any, Any]:
    """Return a tokenizer, and the processor that it is part of.

    Args:
        given: A tokenizer or a processor of transformers, or ``None``.

    Returns:
        The tokenizer and the processor; ``None`` for what was not given.

    Raises:
        FlexpatchError: For a part of a processor that makes no tokens.
    """
    if getattr(given, "tokenizer", None) is not None:
        return given.tokenizer, given
    if any(getattr(given, name, None) is not None for name in ("image_mean", "image_processor", "sampling_rate")):
        raise FlexpatchError(
            f"{type(given).__name__} makes no tokens: pass the whole processor, AutoProcessor.from_pretrained(...)"
        )
    return given, None


def images_of_row(example: Mapping[str, Any], sample: int | str) -> list[Any] | None:
    """Read the images of a dataset row.

    Args:
        example: The dataset row.
        sample: Its name in error messages.

    Returns:
        The images; ``None`` for a row without a column of them.

    Raises:
        FlexpatchError: For two columns, or images that are no list.
    """
    given = [name for name in COLUMNS if name in example]
    if not given:
        return None
    if len(given) > 1:
        raise FlexpatchError(f"sample {sample}: columns 'images' and 'image' are synonyms; expected one")
    images = example[given[0]]
    if given[0] == "image" or images is None:
        return [] if images is None else [images]
    if not isinstance(images, list | tuple):
        raise FlexpatchError(
            f"sample {sample}: column 'images' holds {type(images).__name__}; expected a list of images"
        )
    return list(images)


def process(
    processor: Any, prompt: Any, answers: Sequence[Any], images: Sequence[Any], template: Mapping[str, Any]
) -> Processed:
    """Make ids and tensors of one dataset row. The processor sees the prompt once.

    Args:
        processor: Of transformers.
        prompt: Text, or messages.
        answers: Of the same kind.
        images: Of the prompt.
        template: More arguments for the chat template.

    Returns:
        The row's ids, and its images.

    Raises:
        ValueError: If the messages have places for another number of images. Processors raise all kinds of errors.
    """
    if not isinstance(prompt, str):
        messages = with_images(prompt, images)
        text = _rendered(processor, messages, template, prompt=True)
        wholes = [_rendered(processor, messages + with_images(each, (), "an answer"), template) for each in answers]
        stop = min(_common(text, whole) for whole in wholes)
        prompt, answers = text[:stop], [whole[stop:] for whole in wholes]
    shown: dict[str, Any] = {"images": [list(images)]} if images else {}
    made = processor(text=[prompt], return_tensors="pt", add_special_tokens=False, **shown)
    tensors = {name: value for name, value in made.items() if name not in TEXT}
    ids = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    return Processed(made["input_ids"][0].tolist(), ids, tensors if images else None)


def with_images(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], whose: str = "the row"
) -> list[dict[str, Any]]:
    """Write messages as lists of parts, and put images in their places.

    Args:
        messages: Each with a role and content: text, or parts of which some are images.
        images: In order.
        whose: In error messages, what the images are of.

    Returns:
        Other messages.

    Raises:
        ValueError: If there are more or fewer places than images.
    """
    written: list[dict[str, Any]] = []
    placed = False
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            parts = [{"type": "text", "text": content}]
            if message["role"] == "user" and not placed:
                parts = [*({"type": "image"} for _ in images), *parts]
                placed = True
            content = parts
        written.append({**message, "content": content})
    left = list(images)
    places = 0
    for message in written:
        if not message["content"] or message["role"] == "tool":
            continue
        parts = []
        for part in message["content"]:
            if part["type"] == "image" and "image" not in part:
                places += 1
                part = {**part, "image": left.pop(0) if left else None}
            parts.append(part)
        message["content"] = parts
    if places != len(images):
        raise ValueError(f"{whose} has {len(images)} images, and its messages have places for {places}")
    return written


def _rendered(processor: Any, messages: list[Any], template: Mapping[str, Any], prompt: bool = False) -> str:
    """Write messages as text. A prompt whose last message is an assistant's is continued, others are answered."""
    more: dict[str, Any] = {}
    if prompt:
        continued = messages[-1]["role"] == "assistant"
        more = dict(add_generation_prompt=not continued, continue_final_message=continued)
    return processor.apply_chat_template(messages, tokenize=False, **more, **template)


def _common(a: str, b: str) -> int:
    """Return the length of the common beginning of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
