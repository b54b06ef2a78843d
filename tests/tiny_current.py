"""Tiny models of families whose processors want torchvision, rotary vision towers, or tokens of their own."""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from transformers import AutoConfig, SiglipVisionConfig
from transformers.processing_utils import ProcessorMixin

from tiny_models import IMAGE, TEXT, VISION, VOCABULARY, WORDS, Tiny, llava_processor, tokenizer

SIZE = {"height": 16, "width": 16}
NAMES = {
    "image_token": "<image>", "context_image_token": "<image>", "video_token": "<video>", "boi_token": "<image_start>",
    "eoi_token": "<image_end>", "start_image_token": "<image_start>", "end_image_token": "<image_end>",
    "image_break_token": "<image_break>", "image_end_token": "<image_end>", "img_line_break_token": "<image_break>",
    "tile_token": "<image_break>", "tile_global_token": "<global-img>",
}  # fmt: skip


def processor_of(family: str, name: str, *parts: Any, **options: Any) -> Any:
    """A processor, also where torchvision is missing: its video part is left out then, and nobody checks the parts' classes."""
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    checked, ProcessorMixin.check_argument_for_proper_class = ProcessorMixin.check_argument_for_proper_class, lambda *_: object  # type: ignore
    try:
        found = getattr(module, name)(*parts, **options)
    finally:
        ProcessorMixin.check_argument_for_proper_class = checked
    found.get_attributes = lambda: [part for part in type(found).get_attributes() if getattr(found, part) is not None]
    return found


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**SIGLIP)


def _onevision():
    images = transformers.LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=[[16, 16], [16, 32]])
    return processor_of(
        "llava_onevision", "LlavaOnevisionProcessor", images, tokenizer(), None, num_image_tokens=4,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


def _pixtral_images():
    return transformers.PixtralImageProcessorPil(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4})


def _lighton(merge: int):
    # Also what stands in for Pixtral's processor, which needs torchvision: the same images and number of tokens.
    return processor_of("lighton_ocr", "LightOnOcrProcessor", _pixtral_images(), tokenizer(**NAMES), patch_size=4, spatial_merge_size=merge)


def _pixtral_config():
    return AutoConfig.for_model("pixtral", **(VISION | {"patch_size": 4}), intermediate_size=40)


def _gemma3():
    images = transformers.Gemma3ImageProcessorPil(size=SIZE)
    return processor_of("gemma3", "Gemma3Processor", images, tokenizer(**NAMES), image_seq_length=4)


def _paligemma():
    images = transformers.SiglipImageProcessorPil(size=SIZE)
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, tokenizer(**NAMES, bos_token="<unk>"))


def _internvl():
    images = transformers.GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=2)
    return processor_of("internvl", "InternVLProcessor", images, tokenizer(**NAMES), None, image_seq_length=1)


def _aya():
    images = transformers.GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=2)
    return transformers.AyaVisionProcessor(
        images, tokenizer(**NAMES), patch_size=8, img_size=16, downsample_factor=2, start_of_img_token="<image_start>",
        end_of_img_token="<image_end>", img_patch_token="<image>", img_line_break_token="<image_break>", tile_token="<video>",
        tile_global_token="<global-img>",
    )  # fmt: skip


def _deepseek():
    images = transformers.DeepseekVLImageProcessorPil(size=SIZE, min_size=4)
    return transformers.DeepseekVLProcessor(images, tokenizer(**NAMES), num_image_tokens=4)


def _ovis():
    images = transformers.Ovis2ImageProcessorPil(size=SIZE, crop_to_patches=False)
    return transformers.Ovis2Processor(images, tokenizer(), image_token="<image>", image_seq_length=4)


def _mllama():
    images = transformers.MllamaImageProcessorPil(size=SIZE, max_image_tiles=2)
    return transformers.MllamaProcessor(images, tokenizer(**NAMES, bos_token="<unk>"))


def _qwen(family: str, name: str):
    images = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    return processor_of(family, name, images, tokenizer(**NAMES), None)


def _qwen_config(kind: str, vision: dict[str, Any], **extra: Any):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, **extra}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=WORDS.index("<video>"))


# Language models with sliding windows: three layers, the second one without.
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIGLIP = {**VISION, "intermediate_size": 40, "vision_use_head": False}


def _text(kind: str, **extra: Any):
    return AutoConfig.for_model(kind, **(TEXT | HEADS | extra))


def _llava(kind: str, **extra: Any) -> Tiny:
    """A LLaVA with another language model."""
    return Tiny(
        f"llava-siglip-{kind}",
        lambda: AutoConfig.for_model(
            "llava", vision_config=_siglip(), text_config=_text(kind, **extra), image_token_id=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy="full", image_seq_length=4,
        ),
        lambda: llava_processor(False),
    )  # fmt: skip


def _blip_images():
    return transformers.BlipImageProcessorPil(size=SIZE)


def _blip2(kind: str, text: Any, **qformer: Any):
    """BLIP-2 or InstructBLIP; the Q-Former has a layer with and a layer without cross-attention."""
    queries = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": VOCABULARY,
        "initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **qformer,
    }  # fmt: skip
    return AutoConfig.for_model(
        kind, vision_config=VISION | {"intermediate_size": 40}, qformer_config=queries, text_config=text.to_dict(), num_query_tokens=3,
        image_token_index=IMAGE,
    )  # fmt: skip


def _opt():
    return AutoConfig.for_model("opt", **TEXT, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, init_std=0.3)


CURRENT = [
    _llava("ministral3", sliding_window=None),
    _llava("smollm3"),
    _llava("granite", residual_multiplier=0.5),
    Tiny(
        "llava-onevision",
        lambda: AutoConfig.for_model(
            "llava_onevision", vision_config=_siglip(), text_config=_text("qwen2"), image_token_id=IMAGE,
            video_token_id=WORDS.index("<video>"), image_grid_pinpoints=[[16, 16], [16, 32]], vision_feature_layer=-1,
        ),
        _onevision,
        offline=True,
    ),
    Tiny(
        "llava-pixtral",
        lambda: AutoConfig.for_model(
            "llava", vision_config=_pixtral_config(), text_config=_text("mistral", sliding_window=None), image_token_id=IMAGE,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        ),
        lambda: _lighton(1),
        offline=True,
    ),
    Tiny(
        "mistral3",
        lambda: AutoConfig.for_model(
            "mistral3", vision_config=_pixtral_config(), text_config=_text("mistral", sliding_window=None), image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        lambda: _lighton(2),
        offline=True,
    ),
    Tiny(
        "lighton-ocr",
        lambda: AutoConfig.for_model(
            "lighton_ocr", vision_config=_pixtral_config(), text_config=_text("qwen3"), image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        lambda: _lighton(2),
        offline=True,
    ),
    Tiny(
        "aya-vision",
        lambda: AutoConfig.for_model(
            "aya_vision", vision_config=_siglip(), image_token_id=IMAGE, downsample_factor=2, vision_feature_layer=-1,
            text_config=_text("cohere2", **SLIDING),
        ),
        _aya,
    ),
    Tiny(
        "cohere2-vision",
        lambda: AutoConfig.for_model(
            "cohere2_vision", vision_config=_siglip(), image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=32,
            text_config=_text("cohere2", **SLIDING),
        ),
        _aya,  # its own needs torchvision; the same tiles and number of tokens
        offline=True,
    ),
    Tiny(
        "deepseek-vl",
        lambda: AutoConfig.for_model(
            "deepseek_vl", vision_config=_siglip(), text_config=_text("llama"), image_token_id=IMAGE
        ),
        _deepseek,
    ),
    Tiny(
        "internvl",
        lambda: AutoConfig.for_model(
            "internvl", image_token_id=IMAGE, text_config=_text("qwen3"), image_seq_length=1, vision_feature_layer=-1,
            vision_config={
                **VISION, "image_size": [16, 16], "patch_size": [8, 8], "intermediate_size": 40, "layer_scale_init_value": 0.7,
                "use_mean_pooling": True, "attention_bias": True,
            },
        ),
        _internvl,
        offline=True,
    ),
    Tiny(
        "ovis2",
        lambda: AutoConfig.for_model(
            "ovis2", image_token_id=WORDS.index("<IMG_ATOM>"), hidden_size=32, vocab_size=VOCABULARY,
            visual_indicator_token_ids=[WORDS.index(f"<IMG_{name}>") for name in ("START", "GRID", "COL", "ROW", "END")],
            text_config=_text("qwen2"),
            vision_config={**VISION, "intermediate_size": 40, "vocab_size": 48, "hidden_stride": 1, "num_visual_indicator_tokens": 5},
        ),
        _ovis,
    ),
    Tiny(
        "paligemma",
        lambda: AutoConfig.for_model(
            "paligemma", vision_config=SIGLIP | {"model_type": "siglip_vision_model"},
            text_config=_text("gemma"), image_token_id=IMAGE, projection_dim=32, hidden_size=32,
        ),
        _paligemma,
    ),
    Tiny(
        "paligemma2",
        lambda: AutoConfig.for_model(
            "paligemma", vision_config=SIGLIP | {"model_type": "siglip_vision_model"},
            text_config=_text("gemma2", **SLIDING), image_token_id=IMAGE, projection_dim=32, hidden_size=32,
        ),
        _paligemma,
    ),
    Tiny(
        "gemma3",
        lambda: AutoConfig.for_model(
            "gemma3", vision_config=SIGLIP, image_token_id=IMAGE,
            boi_token_index=WORDS.index("<image_start>"), eoi_token_index=WORDS.index("<image_end>"), mm_tokens_per_image=4,
            text_config=TEXT | HEADS | SLIDING,
        ),
        _gemma3,
    ),
    Tiny(
        "mllama",
        lambda: AutoConfig.for_model(
            "mllama", image_token_index=IMAGE,
            text_config=TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config={
                "hidden_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 40,
                "vision_output_dim": 48, "image_size": 16, "patch_size": 8, "max_num_tiles": 2, "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "initializer_range": 0.2,
            },
        ),
        _mllama,
    ),
    Tiny(
        "blip2-opt",
        lambda: _blip2("blip-2", _opt()),
        lambda: transformers.Blip2Processor(_blip_images(), tokenizer(), num_query_tokens=3),
    ),
    Tiny(
        "instructblip-llama",
        lambda: _blip2("instructblip", _text("llama")),
        lambda: transformers.InstructBlipProcessor(_blip_images(), tokenizer(), tokenizer(), num_query_tokens=3),
    ),
    Tiny(
        "qwen2-vl",
        lambda: _qwen_config(
            "qwen2_vl",
            {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2},
        ),
        lambda: _qwen("qwen2_vl", "Qwen2VLProcessor"),
        offline=True,
    ),
    Tiny(
        "qwen2.5-vl",
        lambda: _qwen_config(
            "qwen2_5_vl",
            {
                "hidden_size": 32, "out_hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 40, "patch_size": 4,
                "spatial_merge_size": 2, "window_size": 8, "fullatt_block_indexes": [1],
            },
        ),
        lambda: _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor"),
        offline=True,
    ),
    Tiny(
        "qwen3-vl",
        lambda: _qwen_config(
            "qwen3_vl",
            {
                "hidden_size": 32, "out_hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 40, "patch_size": 4,
                "spatial_merge_size": 2, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
            },
            head_dim=8, num_hidden_layers=3,
        ),
        lambda: _qwen("qwen3_vl", "Qwen3VLProcessor"),
        offline=True,
    ),
]  # fmt: skip
