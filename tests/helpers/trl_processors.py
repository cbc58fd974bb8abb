"""Processors of images and text that need no download, and tiny random models that fit them."""

from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from flexpatch.models import TINY, tiny_config, tiny_model
from helpers.tokenizers_offline import make_tokenizer

# Text that stands for an image in a prompt, for each class.
MARKS = {
    "llava": "<image>",
    "gemma3": "<boi>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
}
SPECIALS = {
    "llava": dict(image_token="<image>"),
    "gemma3": dict(image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>"),
    "qwen2_5_vl": dict(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    ),
    "idefics3": dict(image_token="<image>"),
}
SPECIALS["qwen3_vl"] = SPECIALS["qwen2_5_vl"]
# The entries of configurations that hold these tokens' ids.
ENTRIES = dict(
    image_token="image_token_id", video_token="video_token_id", vision_bos_token="vision_start_token_id",
    vision_eos_token="vision_end_token_id", boi_token="boi_token_index", eoi_token="eoi_token_index",
)  # fmt: skip
TEMPLATE = (
    "{%% for message in messages %%}<|{{ message['role'] }}|>"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}"
    "<|end|>{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)


class _NoVideos:
    """A processor without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


class Qwen25(_NoVideos, Qwen2_5_VLProcessor):
    pass


class Qwen3(_NoVideos, Qwen3VLProcessor):
    pass


@cache
def make_processor(kind: str) -> ProcessorMixin:
    """Make the processor of a multimodal class."""
    tokenizer = make_tokenizer()
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left",
        extra_special_tokens=SPECIALS[kind],
    )  # fmt: skip
    template = TEMPLATE % MARKS[kind]
    if kind == "llava":
        square = CLIPImageProcessorPil(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
        return LlavaProcessor(square, tokenizer, 14, "default", template, num_additional_image_tokens=1)
    if kind == "gemma3":
        square = Gemma3ImageProcessorPil(size=dict(height=28, width=28))
        return Gemma3Processor(square, tokenizer, template, image_seq_length=4)
    if kind == "idefics3":
        square = Idefics3ImageProcessorPil(
            size=dict(longest_edge=28), max_image_size=dict(longest_edge=28), do_image_splitting=False
        )
        return Idefics3Processor(square, tokenizer, 4, template)
    patches = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size=dict(shortest_edge=64, longest_edge=1024)
    )
    return (Qwen25 if kind == "qwen2_5_vl" else Qwen3)(patches, tokenizer, None, chat_template=template)


def pictured_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny random model whose placeholders are those of its processor."""
    tokenizer = make_processor(kind).tokenizer
    with mock.patch.dict(TINY, vocab_size=len(tokenizer), max_position_embeddings=1024):
        config = tiny_config(kind)
    for name, token in SPECIALS[kind].items():
        setattr(config, ENTRIES[name], tokenizer.convert_tokens_to_ids(token))
    with mock.patch("flexpatch.models.tiny_config", lambda *_: config):
        return tiny_model(kind, dtype=dtype, seed=seed)


def picture(number: int, width: int = 24, height: int = 16) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))
