"""LLaVA and its relatives: a CLIP, SigLIP or DINOv2 vision tower and a Llama, Qwen2 or Mistral language model."""

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import CLIP_STYLE, DINOV2, LLAMA_STYLE_MODELS


def _llava(model_type: str) -> FamilyDeclaration:
    return FamilyDeclaration(
        model_type=model_type,
        vision="model.vision_tower",
        text="model.language_model",
        projector="model.multi_modal_projector",
        vision_towers={"clip_vision_model": CLIP_STYLE, "siglip_vision_model": CLIP_STYLE, "dinov2": DINOV2},
        text_towers=LLAMA_STYLE_MODELS,
    )


LLAVA, LLAVA_NEXT, VIPLLAVA = map(_llava, ("llava", "llava_next", "vipllava"))
