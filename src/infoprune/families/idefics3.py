"""Idefics3 and SmolVLM: SigLIP-style vision tower, pixel shuffle, Llama-style language model."""

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import CLIP_STYLE, LLAMA_STYLE

_TEXT = {"llama": LLAMA_STYLE, "qwen2": LLAMA_STYLE, "mistral": LLAMA_STYLE}

IDEFICS3 = FamilyDeclaration(
    model_type="idefics3",
    vision="model.vision_model",
    text="model.text_model",
    projector="model.connector",
    vision_towers={"idefics3_vision": CLIP_STYLE},
    text_towers=_TEXT,
)
SMOLVLM = FamilyDeclaration(
    model_type="smolvlm",
    vision="model.vision_model",
    text="model.text_model",
    projector="model.connector",
    vision_towers={"smolvlm_vision": CLIP_STYLE},
    text_towers=_TEXT,
)
