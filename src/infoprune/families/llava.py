"""LLaVA and its descendants: a vision tower, a projector and a language model, each of a kind of its own."""

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import LANGUAGE_MODELS, VISION_TOWERS


def _llava(model_type: str, vision: str = "model.vision_tower", projector: str = "model.multi_modal_projector") -> FamilyDeclaration:
    return FamilyDeclaration(
        model_type=model_type,
        vision=vision,
        text="model.language_model",
        projector=(projector,),
        vision_towers=VISION_TOWERS,
        text_towers=LANGUAGE_MODELS,
    )


LLAVA_STYLE = (
    *map(_llava, ("llava", "llava_next", "llava_onevision", "vipllava", "mistral3", "aya_vision", "cohere2_vision")),
    _llava("deepseek_vl", "model.vision_model", "model.aligner"),
    _llava("lighton_ocr", "model.vision_encoder", "model.vision_projection"),
)
