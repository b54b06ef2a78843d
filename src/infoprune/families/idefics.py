"""Idefics2, Idefics3 and SmolVLM: SigLIP-style vision tower, perceiver or pixel shuffle, language model."""

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import CLIP_STYLE, LANGUAGE_MODELS


def _idefics(model_type: str) -> FamilyDeclaration:
    return FamilyDeclaration(
        model_type=model_type,
        vision="model.vision_model",
        text="model.text_model",
        projector=("model.connector",),
        vision_towers={f"{model_type}_vision": CLIP_STYLE},
        text_towers=LANGUAGE_MODELS,
    )


IDEFICS_STYLE = tuple(map(_idefics, ("idefics2", "idefics3", "smolvlm")))
