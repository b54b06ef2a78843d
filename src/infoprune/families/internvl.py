"""InternVL: InternViT, pixel shuffle, language model."""

from dataclasses import replace

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import DINOV2, LANGUAGE_MODELS

INTERNVL = FamilyDeclaration(
    model_type="internvl",
    vision="model.vision_tower",
    text="model.language_model",
    projector=("model.multi_modal_projector",),
    vision_towers={"internvl_vision": replace(DINOV2, out="projection_layer")},
    text_towers=LANGUAGE_MODELS,
)
