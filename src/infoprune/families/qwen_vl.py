"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense): vision towers with rotary positions and windows, language models with 3-D positions."""

from dataclasses import replace

from infoprune.architecture import FamilyDeclaration, TowerDeclaration
from infoprune.families.towers import LLAMA_STYLE

_QWEN2_VISION = TowerDeclaration(
    layers="blocks",
    attention="attn",
    ffn="mlp",
    out="proj",
    qkv="qkv",
    up="fc1",
    down="fc2",
)
_QWEN2_5_VISION = replace(_QWEN2_VISION, gate="gate_proj", up="up_proj", down="down_proj")
_QWEN3_VISION = replace(_QWEN2_VISION, up="linear_fc1", down="linear_fc2")


def _qwen(model_type: str, vision: TowerDeclaration) -> FamilyDeclaration:
    return FamilyDeclaration(
        model_type=model_type,
        vision="model.visual",
        text="model.language_model",
        projector=("model.visual.merger",),
        vision_towers={f"{model_type}_vision": vision},
        text_towers={f"{model_type}_text": LLAMA_STYLE},
        positions="get_rope_index",
        token_types="mm_token_type_ids",
    )


QWEN_VL = tuple(_qwen(*kind) for kind in (("qwen2_vl", _QWEN2_VISION), ("qwen2_5_vl", _QWEN2_5_VISION), ("qwen3_vl", _QWEN3_VISION)))
