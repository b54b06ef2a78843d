"""Llama 3.2 Vision: a vision tower of a local and a gated global stack, and gated cross-attention layers in the language model."""

from dataclasses import replace

from infoprune.architecture import FamilyDeclaration
from infoprune.families.towers import CLIP_STYLE, LLAMA_STYLE

_LOCAL = replace(CLIP_STYLE, layers="transformer.layers", out="o_proj")
_GLOBAL = replace(_LOCAL, layers="global_transformer.layers", rescaled=True)
# Decoding skips a cross-attention layer without cached keys, FFN and all.
_CROSS = replace(LLAMA_STYLE, attention="cross_attn", rescaled=True, stays=True)

MLLAMA = FamilyDeclaration(
    model_type="mllama",
    vision="model.vision_model",
    text="model.language_model",
    projector=("model.multi_modal_projector",),
    vision_towers={"mllama_vision_model": replace(_LOCAL, others=(_GLOBAL,))},
    text_towers={"mllama_text_model": replace(LLAMA_STYLE, others=(_CROSS,))},
    shares_prefix=False,
    token_types="cross_attention_mask",
    answer_type=None,
)
