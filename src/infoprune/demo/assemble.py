"""Assemble the demo vision-language model: DINOv2-small, SmolLM2-135M-Instruct and a trained bridge, as an ordinary LLaVA.

The bridge (projector and LoRA on the language linears) is committed beside this file; ``scripts/train_bridge.py`` made it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    BitImageProcessorPil,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from infoprune.demo import convert
from infoprune.demo.sources import LANGUAGE, VISION, Notify, cache_directory, fetch
from infoprune.errors import CheckpointError

BRIDGE = Path(__file__).parent / "bridge.safetensors"
LORA_RANK, LORA_ALPHA = 16, 32
IMAGE_SIZE, IMAGE_TOKEN = 84, "<image>"
# No system prompt: image, question, answer. Multi-turn use appends " answer<|im_end|>".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)


def build_without_bridge(notify: Notify = lambda message: None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Both pretrained towers joined by a randomly initialised projector, in float32."""
    vision_file, language_file = fetch(VISION, notify=notify), fetch(LANGUAGE, notify=notify)
    notify("converting DINOv2-small and SmolLM2-135M (once; about half a minute)")
    vision_state = convert.dinov2_state_dict(vision_file)
    language, tokenizer = convert.smollm2(language_file)
    processor = _processor(tokenizer)
    config: Any = LlavaConfig(
        vision_config=convert.dinov2_config(),
        text_config=language.config,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # drops CLS: 36 tokens for 84 x 84
        image_seq_length=(IMAGE_SIZE // convert.VISION_CONFIG["patch_size"]) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # the projector starts the same everywhere
    model: Any = LlavaForConditionalGeneration(config)
    _grow_vocabulary_(language, len(tokenizer))
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.config.text_config.vocab_size = language.config.vocab_size
    model.model.vision_tower = Dinov2Model.from_pretrained(None, config=config.vision_config, state_dict=vision_state)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    model.tie_weights()
    return model.float().eval(), processor


@torch.no_grad()
def _grow_vocabulary_(language: LlamaForCausalLM, size: int) -> None:
    """Room for the image token; new rows hold the mean embedding, so that nothing depends on a random generator."""
    known = language.config.vocab_size
    language.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)
    table: Any = language.get_input_embeddings().weight
    table[known:] = table[:known].mean(0)


def _processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    image_processor = BitImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=convert.VISION_CONFIG["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def merge_bridge_(model: LlavaForConditionalGeneration, bridge: dict[str, torch.Tensor]) -> None:
    """Load the projector and add ``alpha / r * B @ A`` to every language linear that has a LoRA pair.

    Args:
        model: Result of :func:`build_without_bridge`; changed in place.
        bridge: ``projector.*`` tensors, and per language linear ``lora.<path>.A`` (r, in) and ``lora.<path>.B`` (out, r).
    """
    projector = {name.removeprefix("projector."): value.float() for name, value in bridge.items() if name.startswith("projector.")}
    model.model.multi_modal_projector.load_state_dict(projector)
    for name, a in bridge.items():
        if name.startswith("lora.") and name.endswith(".A"):
            path = name.removeprefix("lora.").removesuffix(".A")
            b = bridge[f"lora.{path}.B"]
            model.model.language_model.get_submodule(path).weight.add_(LORA_ALPHA / LORA_RANK * (b.float() @ a.float()))


def ensure_demo(notify: Notify = lambda message: None) -> Path:
    """Directory of the assembled demo checkpoint, building it in the cache on first use.

    Raises:
        CheckpointError: The bridge file is missing from the installation.
        InfoPruneError: A download failed.
    """
    if not BRIDGE.is_file():
        raise CheckpointError(f"The demo model's bridge is missing at {BRIDGE}; reinstall infoprune or run scripts/train_bridge.py.")
    recipe = hashlib.sha256(BRIDGE.read_bytes() + Path(__file__).read_bytes() + Path(convert.__file__).read_bytes()).hexdigest()[:12]
    target = cache_directory() / f"demo-{recipe}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assemble-") as scratch:
        model, processor = build_without_bridge(notify)
        merge_bridge_(model, load_file(BRIDGE))
        notify("writing the demo checkpoint (630 MB)")
        built = Path(scratch) / "demo"
        model.save_pretrained(built)
        processor.save_pretrained(built)
        sources = [{"requirement": s.requirement, "sha256": s.sha256, "licence": s.licence} for s in (VISION, LANGUAGE)]
        (built / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        built.rename(target)
    return target
