"""BLIP-2 and InstructBLIP: a vision tower, a Q-Former that stays whole, and a language model of the OPT or Llama kind."""

from dataclasses import replace

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import CLIP_STYLE, LANGUAGE_MODELS

_VISION = replace(CLIP_STYLE, out="projection", qkv="qkv")
_OPT = replace(CLIP_STYLE, layers="model.decoder.layers", ffn="")

BLIP2 = FamilyDeclaration(
    model_type="blip-2",
    vision="vision_model",
    text="language_model",
    head="language_model.lm_head",
    projector=("qformer", "language_projection"),
    vision_towers={"blip_2_vision_model": _VISION},
    text_towers={"opt": _OPT, **{kind: replace(tower, layers=f"model.{tower.layers}") for kind, tower in LANGUAGE_MODELS.items()}},
    prompt="Question: {question} Answer:",
)
INSTRUCTBLIP = replace(
    BLIP2,
    model_type="instructblip",
    vision_towers={"instructblip_vision_model": _VISION},
    shares_prefix=False,
    prompt="{question}",
    question_inputs=("qformer_input_ids", "qformer_attention_mask"),
)
