"""Processors of the tiny multimodal models, one of each layout, made where they are used: no download."""

from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PLAIN = {"<|pad|>": 0, "<|begin|>": 1, "<|end|>": 2, "<|unknown|>": 3}
# Marks of images, with the ids of the tiny models' configurations.
MARKS: dict[str, dict[str, int]] = {
    "qwen2_5_vl": {"<|image_pad|>": 149, "<|video_pad|>": 146, "<|vision_start|>": 148, "<|vision_end|>": 147},
    "gemma3": {"<image_soft_token>": 149, "<start_of_image>": 148, "<end_of_image>": 147},
    "idefics3": {
        "<image>": 149, "<fake_token_around_image>": 4, "<global-img>": 5, "<end_of_utterance>": 6, "<row_1_col_1>": 8,
    },
    "llava_next": {"<image>": 149},
}  # fmt: skip
PLACES = dict(
    qwen2_5_vl="<|vision_start|><|image_pad|><|vision_end|>", gemma3="<start_of_image>", idefics3="<image>",
    llava_next="<image>",
)  # fmt: skip
KINDS = list(MARKS)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token for each character, and the marks of images."""
    characters = " \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!|<>_-"
    vocabulary = PLAIN | MARKS[kind] | {character: 20 + i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in PLAIN | MARKS[kind]])
    names: dict[str, Any] = dict(
        pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    if kind == "gemma3":
        names["extra_special_tokens"] = dict(
            image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def chat_template(kind: str) -> str:
    """A template that writes a mark for each image."""
    part = "{% if part['type'] == 'image' %}" + PLACES[kind] + "{% else %}{{ part['text'] }}{% endif %}"
    each = "{% for part in message['content'] %}" + part + "{% endfor %}"
    return (
        "{% for message in messages %}<{{ message['role'] }}>" + each + "<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


class WithoutVideos(transformers.Qwen2_5_VLProcessor):
    """One whose part for videos, which needs torchvision, is missing."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return argument if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def make_processor(kind: str) -> Any:
    """The processor of a tiny model's type."""
    tokenizer, template = make_tokenizer(kind), chat_template(kind)
    if kind == "qwen2_5_vl":
        size = dict(shortest_edge=64, longest_edge=1024)
        images = transformers.Qwen2VLImageProcessor(size=size, patch_size=4, temporal_patch_size=2, merge_size=2)
        return WithoutVideos(images, tokenizer, chat_template=template)
    if kind == "gemma3":
        images = transformers.Gemma3ImageProcessor(size=dict(height=28, width=28))
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    if kind == "idefics3":
        edge = dict(longest_edge=28)
        images = transformers.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
        return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    size = dict(height=28, width=28)
    images = transformers.LlavaNextImageProcessor(
        size=size, crop_size=size, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
    )
    return transformers.LlavaNextProcessor(
        images, tokenizer, 14, "default", chat_template=template, num_additional_image_tokens=1
    )


def picture(seed: int, width: int = 16, height: int = 24) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)
