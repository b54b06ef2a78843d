"""Tower declarations that several families share."""

from dataclasses import replace

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
    rescaled=True,
)
PIXTRAL = TowerDeclaration(
    layers="transformer.layers",
    attention="attention",
    ffn="feed_forward",
    out="o_proj",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
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
SANDWICH = replace(LLAMA_STYLE, rescaled=True)  # a norm behind each block, or a factor on its output
# Vision towers and language models that LLaVA's descendants combine, by ``model_type``.
VISION_TOWERS = {"clip_vision_model": CLIP_STYLE, "siglip_vision_model": CLIP_STYLE, "dinov2": DINOV2, "pixtral": PIXTRAL}
LANGUAGE_MODELS: dict[str, TowerDeclaration] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "ministral3", "gemma", "cohere2", "smollm3"), LLAMA_STYLE),
    **dict.fromkeys(("gemma2", "gemma3_text", "granite"), SANDWICH),
}
