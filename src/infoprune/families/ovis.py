"""Ovis2: an AIMv2-style vision tower, a table of visual words, language model."""

from infoprune.architecture import FamilyDeclaration, TowerDeclaration
from infoprune.families.towers import LANGUAGE_MODELS

OVIS2 = FamilyDeclaration(
    model_type="ovis2",
    vision="model.vision_tower",
    text="model.language_model",
    projector=("model.vision_tower.head_linear", "model.visual_embeddings_table"),  # the table is multiplied by, one row a visual word
    vision_towers={
        "ovis2_vision": TowerDeclaration(
            layers="transformer.encoder.layers",
            attention="attention",
            ffn="ffn",
            out="out_proj",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
        )
    },
    text_towers=LANGUAGE_MODELS,
)
