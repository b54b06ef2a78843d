"""A tiny random model of every declared family and tower combination, with a real processor, built in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Idefics2Config,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SmolVLMConfig,
    VipLlavaConfig,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig, Idefics2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from infoprune.data import Example
from infoprune.model import VLM, prompt_encoder
from infoprune.packing import answer_logits, batches
from infoprune.resolve import resolve

WORDS = ["<pad>", "<eos>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
WORDS += ["what", "colour", "shape", "is", "the", "there", "a", "in", "image", "red", "blue", "circle", "square", "yes", "no", "?"]
WORDS += [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
WORDS += ["<image_start>", "<image_end>", "<image_break>", "<video>"]
WORDS += ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
IMAGE = WORDS.index("<image>")
VOCABULARY = 64
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "initializer_range": 0.2}


def tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """Words and special tokens; ``names`` are attributes under which a processor looks for some of the latter."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=names or [word for word in WORDS if word.startswith("<") and word not in ("<pad>", "<eos>", "<unk>")],
    )  # fmt: skip


def llava_processor(with_class_token: bool) -> LlavaProcessor:
    image_processor = BitImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer(), patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default" if with_class_token else "full", num_additional_image_tokens=int(with_class_token),
    )  # fmt: skip


def llava_next_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    return LlavaNextProcessor(images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def idefics2_processor() -> Idefics2Processor:
    images = Idefics2ImageProcessorPil(size={"longest_edge": 16, "shortest_edge": 16}, do_image_splitting=False)
    return Idefics2Processor(images, tokenizer(), image_seq_len=3)


def idefics3_processor(image_seq_len: int = 1) -> Idefics3Processor:
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True, return_row_col_info=True
    )
    return Idefics3Processor(image_processor, tokenizer(), image_seq_len=image_seq_len)


def text_config(kind: str, heads: int, key_value_heads: int):
    extra = {"sliding_window": None} if kind == "mistral" else {}
    return AutoConfig.for_model(kind, **TEXT, num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=8, **extra)


def llava(vision, text, with_class_token: bool, layer: int = -1) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE, vision_feature_layer=layer,
        vision_feature_select_strategy="default" if with_class_token else "full", image_seq_length=4,
    )  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """One entry of the shared suite.

    Attributes:
        name: Of the test.
        config: Makes the configuration.
        processor: Makes the processor.
        offline: The family's processor can't be loaded from a folder without torchvision.
    """

    name: str
    config: Callable[[], object]
    processor: Callable[[], object]
    offline: bool = False


def _clip(**extra):
    return CLIPVisionConfig(**VISION, intermediate_size=40, projection_dim=24, **extra)


TINY = [
    Tiny("llava-clip-llama-mha", lambda: llava(_clip(), text_config("llama", 4, 4), True, -2), lambda: llava_processor(True)),
    Tiny(
        "llava-siglip-qwen2-gqa",
        lambda: llava(SiglipVisionConfig(**VISION, intermediate_size=40), text_config("qwen2", 4, 2), False),
        lambda: llava_processor(False),
    ),
    Tiny(
        "llava-dinov2-mistral-mqa",
        lambda: llava(Dinov2Config(**VISION, mlp_ratio=2, layerscale_value=0.7), text_config("mistral", 4, 1), True),
        lambda: llava_processor(True),
    ),
    Tiny(
        "llava-next",
        lambda: LlavaNextConfig(
            vision_config=_clip(), text_config=text_config("mistral", 4, 2), image_token_index=IMAGE,
            image_grid_pinpoints=[[16, 32], [32, 16]], image_seq_length=4,
        ),
        llava_next_processor,
    ),
    Tiny(
        "vipllava",
        lambda: VipLlavaConfig(
            vision_config=_clip(), text_config=text_config("llama", 4, 4), image_token_index=IMAGE, vision_feature_layers=[-2, 1],
            image_seq_length=4,
        ),
        lambda: llava_processor(True),
    ),
    Tiny(
        "idefics2",
        lambda: Idefics2Config(
            vision_config=Idefics2VisionConfig(**VISION, intermediate_size=40), text_config=text_config("mistral", 4, 2),
            perceiver_config=Idefics2PerceiverConfig(
                hidden_size=32, resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8, num_key_value_heads=1
            ),
            image_token_id=IMAGE, pad_token_id=0,
        ),
        idefics2_processor,
    ),
    Tiny(
        "idefics3",
        lambda: Idefics3Config(
            vision_config=Idefics3VisionConfig(**VISION, intermediate_size=40), text_config=text_config("llama", 8, 4),
            image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
        ),
        idefics3_processor,
    ),
    Tiny(
        "smolvlm",
        lambda: SmolVLMConfig(
            vision_config=SmolVLMVisionConfig(**(VISION | {"patch_size": 4}), intermediate_size=40), text_config=text_config("llama", 4, 2),
            image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
        ),
        lambda: idefics3_processor(4),
    ),
]  # fmt: skip


def build(tiny: Tiny, seed: int = 0) -> VLM:
    """A randomly initialised model; biases and query tokens too, so that none is accidentally zero."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny.config(), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "query_tokens")):
                parameter.normal_(0, 0.1)
    processor = tiny.processor()
    model.generation_config.pad_token_id = 0
    return VLM(model, processor, prompt_encoder(model, processor), resolve(model), tiny.name)


def examples(folder: Path, images: int = 6, seed: int = 0) -> list[Example]:
    """Random images with three questions each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(images):
        path = folder / f"{number}.png"
        if not path.exists():
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
        found += [
            Example(path, "what colour is the circle ?", "red"),
            Example(path, "is there a square in the image ?", "no"),
            Example(path, "what shape ?", "circle"),
        ]
    return found


def teach_(vlm: VLM, questions: list[Example]) -> None:
    """Train a tiny model until it answers ``questions``, so that there is something to lose."""
    optimizer = torch.optim.Adam(vlm.model.parameters(), lr=3e-3)
    groups = [batch for batch, _ in batches(vlm.encoder, questions, images_per_batch=12)]
    for _ in range(30):
        for batch in groups:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(answer_logits(vlm.model, batch), batch.targets).backward()
            optimizer.step()
    for parameter in vlm.model.parameters():
        parameter.grad = None
