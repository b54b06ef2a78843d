"""PaliGemma 1 and 2, and Gemma 3: SigLIP and Gemma, with image tokens (PaliGemma: the whole prompt) that see each other."""

from dataclasses import replace

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import LANGUAGE_MODELS, VISION_TOWERS

PALIGEMMA = FamilyDeclaration(
    model_type="paligemma",
    vision="model.vision_tower",
    text="model.language_model",
    projector=("model.multi_modal_projector",),
    vision_towers=VISION_TOWERS,
    text_towers=LANGUAGE_MODELS,
    shares_prefix=False,
    token_types="token_type_ids",
    answer_type=1,
)
GEMMA3 = replace(PALIGEMMA, model_type="gemma3", answer_type=0)
