"""Families that are known and refused, by ``model_type``, and why."""

_EXPERTS = "its FFNs are banks of experts, which factorisation and the FLOPs count do not know"
_NO_TOWER = "it has no vision tower beside the language model: image patches or codes are its tokens"
_QFORMER = "a Q-Former between the towers, and language models of the OPT and T5 kind, are not declared yet"
_CONTRASTIVE = "it is a dual encoder without answers; contrastive objectives are not built yet"
_FUSED = "its language model fuses gate and up projection, which is not declared yet"
_TIMM = "its vision tower comes from timm, whose parts are not declared"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "glm4v_moe", "llama4", "aria"), _EXPERTS),
    **dict.fromkeys(("fuyu", "chameleon", "emu3"), _NO_TOWER),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _QFORMER),
    **dict.fromkeys(("clip", "siglip", "siglip2", "metaclip_2", "align"), _CONTRASTIVE),
    **dict.fromkeys(("glm4v", "glm46v", "phi4_multimodal"), _FUSED),
    **dict.fromkeys(("perception_lm", "fast_vlm", "gemma3n"), _TIMM),
    "blip": "its language model is a BERT with cross-attention, which is not declared yet",
    "florence2": "its vision tower mixes window and channel attention, and its language model is an encoder-decoder",
    "lfm2_vl": "its language model mixes convolutions with attention, which is not declared yet",
    "got_ocr2": "its vision tower adds relative positions to every head of fused windowed attention, which is not declared yet",
    "deepseek_vl_hybrid": "it has two vision towers",
    "video_llava": "it has two vision towers",
    "janus": "it has heads for images and for text",
}
