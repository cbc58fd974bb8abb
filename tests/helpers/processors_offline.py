"""Processors of the tiny multimodal models, of transformers' own classes, made where they are used: no download.

Tokens have the ids of the tiny models' configurations. Parts for videos, which need torchvision, are left out.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from flexpatch.models import tiny_config, tiny_model
from helpers.needs import needs_packages

PLAIN = {"<|pad|>": 0, "<|begin|>": 1, "<|end|>": 2, "<|unknown|>": 3}
CHARACTERS = " \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!|<>_-"
# One of each layout.
KINDS = ["qwen2_5_vl", "gemma3", "idefics3", "llava_next"]
SQUARE = dict(height=28, width=28)
PATCHES = dict(patch_size=4, merge_size=2)
GRID = dict(PATCHES, temporal_patch_size=2, size=dict(shortest_edge=64, longest_edge=1024))

# A configuration, a tokenizer and a chat template -> the processor.
Make = Callable[[Any, PreTrainedTokenizerFast, str], ProcessorMixin]


class Kind(NamedTuple):
    """How the processor of a class is made.

    Attributes:
        place: Stands for an image in a prompt.
        make: Makes it.
        marks: Tokens of images, each with the entry of the configuration that holds its id. Empty: any id.
        names: Attributes of the tokenizer, each with one of these tokens.
        needs: Packages without which there is no such processor.
    """

    place: str
    make: Make
    marks: dict[str, str]
    names: Mapping[str, str] = MappingProxyType({})
    needs: tuple[str, ...] = ()


def without_videos(name: str) -> type[ProcessorMixin]:
    """A class of transformers whose part for videos may be missing."""
    kind = getattr(transformers, name)

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return kind.check_argument_for_proper_class(self, argument_name, argument)

    return type(name, (kind,), dict(check_argument_for_proper_class=check, __init__=kind.__init__))


def pil(name: str, **settings: Any) -> Any:
    """An image processor, without torchvision if there are two."""
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)


def grid(name: str, images: str, **settings: Any) -> Make:
    """Make processors of patches in a grid."""
    return lambda config, tokenizer, template: without_videos(name)(
        image_processor=pil(images, **settings), tokenizer=tokenizer, video_processor=None, chat_template=template
    )


def gemma3(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = pil("Gemma3ImageProcessor", size=SQUARE)
    return transformers.Gemma3Processor(images, tokenizer, template, image_seq_length=4)


def gemma3n(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = pil("SiglipImageProcessor", size=dict(height=64, width=64))
    sound = transformers.Gemma3nAudioFeatureExtractor()
    return transformers.Gemma3nProcessor(sound, images, tokenizer, template, image_seq_length=4)


def gemma4(name: str) -> Make:
    def make(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
        images = pil(f"{name}ImageProcessor", patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
        sound = getattr(transformers, f"{name}AudioFeatureExtractor")()
        return without_videos(f"{name}Processor")(sound, images, tokenizer, None, template)

    return make


def llava(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = pil("CLIPImageProcessor", size=dict(shortest_edge=28), crop_size=SQUARE)
    return transformers.LlavaProcessor(images, tokenizer, 14, "default", template, num_additional_image_tokens=1)


def llava_next(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    pinpoints = config.image_grid_pinpoints
    images = pil("LlavaNextImageProcessor", size=SQUARE, crop_size=SQUARE, image_grid_pinpoints=pinpoints)
    return transformers.LlavaNextProcessor(images, tokenizer, 14, "default", template, num_additional_image_tokens=1)


def llava_onevision(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = pil("LlavaOnevisionImageProcessor", size=SQUARE, image_grid_pinpoints=config.image_grid_pinpoints)
    return without_videos("LlavaOnevisionProcessor")(images, tokenizer, None, 4, "full", template)


def idefics3(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    edge = dict(longest_edge=28)
    images = pil("Idefics3ImageProcessor", size=edge, max_image_size=edge, do_image_splitting=False)
    return transformers.Idefics3Processor(images, tokenizer, 4, template)


def smolvlm(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    edge = dict(longest_edge=28)
    images = pil("SmolVLMImageProcessor", size=edge, max_image_size=edge, do_image_splitting=False)
    asked = SimpleNamespace(num_frames=1, fps=1)  # its chat template asks the part for videos
    return without_videos("SmolVLMProcessor")(images, tokenizer, asked, 4, template)


def tiled(name: str, **settings: Any) -> Make:
    """Make processors of images that are cut into tiles."""

    def make(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
        images = pil("GotOcr2ImageProcessor", size=SQUARE, min_patches=1, max_patches=2)
        videos = {} if name == "AyaVisionProcessor" else dict(video_processor=None)
        kind = without_videos(name)
        return kind(image_processor=images, tokenizer=tokenizer, chat_template=template, **videos, **settings)

    return make


def cohere2_vision(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, crop_to_patches=True, max_patches=2)
    return transformers.Cohere2VisionProcessor(images, tokenizer, template)


def mistral3(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = pil("PixtralImageProcessor", patch_size=4, size=dict(longest_edge=32))
    return transformers.PixtralProcessor(images, tokenizer, 4, 2, template)


def paligemma(config: Any, tokenizer: Any, template: str) -> ProcessorMixin:
    images = pil("SiglipImageProcessor", size=SQUARE)
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, tokenizer, template)


def qwen(name: str) -> Kind:
    return Kind(
        "<|vision_start|><|image_pad|><|vision_end|>",
        grid(name, "Qwen2VLImageProcessor", **GRID),
        {
            "<|image_pad|>": "image_token_id",
            "<|video_pad|>": "video_token_id",
            "<|vision_start|>": "vision_start_token_id",
            "<|vision_end|>": "vision_end_token_id",
        },
    )


SOUND = {"<|audio|>": "audio_token_id", "<|boa|>": "", "<|eoa|>": ""}
SOUND_NAMES = dict(audio_token="<|audio|>", boa_token="<|boa|>", eoa_token="<|eoa|>")
GEMMA_NAMES = dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
GEMMA = {
    "<image_soft_token>": "image_token_id",
    "<start_of_image>": "boi_token_id",
    "<end_of_image>": "eoi_token_id",
    **SOUND,
}
VIDEOS = {"<|video|>": "video_token_id"}
IDEFICS = {
    "<image>": "image_token_id",
    **dict.fromkeys(("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>"), ""),
}
MADE = {
    "gemma3": Kind(
        "<start_of_image>",
        gemma3,
        {
            "<image_soft_token>": "image_token_id",
            "<start_of_image>": "boi_token_index",
            "<end_of_image>": "eoi_token_index",
        },
        GEMMA_NAMES,
    ),
    "gemma3n": Kind("<image_soft_token>", gemma3n, GEMMA, GEMMA_NAMES | SOUND_NAMES, ("timm",)),
    "gemma4": Kind("<image_soft_token>", gemma4("Gemma4"), GEMMA | VIDEOS, GEMMA_NAMES | SOUND_NAMES),
    "gemma4_unified": Kind(
        "<image_soft_token>", gemma4("Gemma4Unified"), GEMMA | VIDEOS, GEMMA_NAMES | SOUND_NAMES, ("torchvision",)
    ),
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": qwen("Qwen3VLProcessor"),
    "qwen3_5": qwen("Qwen3VLProcessor"),
    "qwen3_5_moe": qwen("Qwen3VLProcessor"),
    "glm4v": Kind(
        "<|begin_of_image|><|image|><|end_of_image|>",
        grid("Glm4vProcessor", "Glm4vImageProcessor", **GRID),
        {
            "<|image|>": "image_token_id",
            "<|begin_of_image|>": "image_start_token_id",
            "<|end_of_image|>": "image_end_token_id",
            "<|begin_of_video|>": "video_start_token_id",
            "<|end_of_video|>": "video_end_token_id",
            **VIDEOS,
        },
    ),
    "llava": Kind("<image>", llava, {"<image>": "image_token_id"}),
    "llava_next": Kind("<image>", llava_next, {"<image>": "image_token_id"}),
    "llava_onevision": Kind(
        "<image>", llava_onevision, {"<image>": "image_token_id", "<video>": "video_token_id"}
    ),
    "internvl": Kind(
        "<IMG_CONTEXT>",
        tiled("InternVLProcessor", image_seq_length=4),
        {"<IMG_CONTEXT>": "image_token_id", "<img>": "", "</img>": "", "<video>": ""},
        dict(
            context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>",
            video_token="<video>",
        ),
    ),
    "smolvlm": Kind("<image>", smolvlm, IDEFICS, needs=("num2words",)),
    "idefics3": Kind("<image>", idefics3, IDEFICS),
    "mistral3": Kind(
        "[IMG]",
        mistral3,
        {"[IMG]": "image_token_id", "[IMG_BREAK]": "", "[IMG_END]": ""},
        needs=("torchvision",),
    ),
    "paligemma": Kind("<image>", paligemma, {"<image>": "image_token_id"}, dict(image_token="<image>")),
    "aya_vision": Kind(
        "<image>",
        tiled("AyaVisionProcessor", patch_size=7, img_size=28, downsample_factor=2),
        {
            "<|IMG_PATCH|>": "image_token_id",
            **dict.fromkeys(("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE", "TILE_GLOBAL"), ""),
        },
    ),
    "cohere2_vision": Kind(
        "<|IMG_PATCH|>",
        cohere2_vision,
        {"<|IMG_PATCH|>": "image_token_id", "<|boi|>": "", "<|eoi|>": "", "<|IMG_LINE_BREAK|>": ""},
        dict(
            image_token="<|IMG_PATCH|>", boi_token="<|boi|>", eoi_token="<|eoi|>",
            img_line_break_token="<|IMG_LINE_BREAK|>",
        ),
        ("torchvision",),
    ),
    "kimi_k25": Kind(
        "<|media_begin|><|media_pad|><|media_end|>",
        grid("Kimi_K25Processor", "Kimi_K25ImageProcessor", **PATCHES),
        {
            "<|media_pad|>": "image_token_id",
            "<|kimi_k25_video_placeholder|>": "video_token_id",
            "<|media_begin|>": "vision_start_token_id",
            "<|media_end|>": "vision_end_token_id",
        },
        needs=("torchvision",),
    ),
    "muse_glimmer": Kind(
        "<|patch|>",
        grid("MuseGlimmerProcessor", "MuseGlimmerImageProcessor", **PATCHES),
        {
            "<|patch|>": "image_token_id",
            "<|video|>": "video_token_id",
            **dict.fromkeys(("<|image_start|>", "<|image_end|>", "<|vid_start|>", "<|vid_end|>"), ""),
        },
        needs=("torchvision",),
    ),
}  # fmt: skip


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token for each character, and the marks of images."""
    config = tiny_config(kind)
    marks = {
        mark: getattr(config, entry) if entry else 4 + place
        for place, (mark, entry) in enumerate(MADE[kind].marks.items())
    }
    vocabulary = PLAIN | marks | {character: 20 + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in PLAIN | marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>",
        unk_token="<|unknown|>", padding_side="left", extra_special_tokens=dict(MADE[kind].names),
    )  # fmt: skip


def chat_template(kind: str) -> str:
    """A template that writes a mark for each image."""
    part = "{% if part['type'] == 'image' %}" + MADE[kind].place + "{% else %}{{ part['text'] }}{% endif %}"
    each = "{% for part in message['content'] %}" + part + "{% endfor %}"
    each = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + each + "{% endif %}"
    return (
        "{% for message in messages %}<{{ message['role'] }}>" + each + "<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def make_processor(kind: str) -> Any:
    """The processor of a tiny model's type."""
    needs_packages(MADE[kind].needs, f"the processor of {kind}")
    return MADE[kind].make(tiny_config(kind), make_tokenizer(kind), chat_template(kind))


def make_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny random model that takes pixels of any precision, and whose images fit its windows."""
    config = tiny_config(kind)
    if kind == "gemma4_unified":  # its processor makes at least 54 tokens of an image
        config.text_config.sliding_window = 96
    with mock.patch("flexpatch.models.tiny_config", lambda *_: config):
        made = tiny_model(kind, dtype=dtype, seed=seed)
    if kind == "kimi_k25":  # the one class that leaves this to autocast, which knows no float64
        made.model.vision_tower.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    return made


def picture(seed: int, width: int = 16, height: int = 24) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
