"""Tower declarations that several families share."""

from infoprune.architecture import TowerDeclaration

CLIP_STYLE = TowerDeclaration(
    layers="encoder.layers",
    attention="self_attn",
    ffn="mlp",
    out="out_proj",
    up="fc1",
    down="fc2",
)
DINOV2 = TowerDeclaration(
    layers="encoder.layer",
    attention="attention",
    ffn="mlp",
    out="o_proj",
    up="fc1",
    down="fc2",
    layer_scale=True,
)
LLAMA_STYLE = TowerDeclaration(
    layers="layers",
    attention="self_attn",
    ffn="mlp",
    out="o_proj",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
# Language models of this style, by ``model_type``.
LLAMA_STYLE_MODELS = {"llama": LLAMA_STYLE, "qwen2": LLAMA_STYLE, "mistral": LLAMA_STYLE}
