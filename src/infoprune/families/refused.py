"""Families that are known and refused, by ``model_type``, and why."""

_EXPERTS = "its FFNs are banks of experts, which factorisation and the FLOPs count do not know"
_NO_TOWER = "it has no vision tower beside the language model: image patches or codes are its tokens"
_FRAMES = "its Q-Former reads several frames of a video, and questions are asked about one image here"
_CONTRASTIVE = "it is a dual encoder without answers; contrastive objectives are not built yet"
_FUSED = "its language model fuses gate and up projection, which is not declared yet"
_TIMM = "its vision tower comes from timm, whose parts are not declared"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "glm4v_moe", "llama4", "aria"), _EXPERTS),
    **dict.fromkeys(("fuyu", "chameleon", "emu3"), _NO_TOWER),
    "instructblipvideo": _FRAMES,
    **dict.fromkeys(("clip", "siglip", "siglip2", "metaclip_2", "align"), _CONTRASTIVE),
    **dict.fromkeys(("glm4v", "glm46v", "phi4_multimodal"), _FUSED),
    **dict.fromkeys(("perception_lm", "fast_vlm", "gemma3n"), _TIMM),
    "blip": "its layers have two attention blocks each, `generate` reads another prompt than the forward pass, and its VQA model is an "
    "encoder-decoder",
    "florence2": "its vision tower attends over windows and over channels in turn, and its language model is an encoder-decoder",
    "lfm2_vl": "its language model mixes convolutions with attention, which is not declared yet",
    "got_ocr2": "its vision tower adds relative positions to every head of fused windowed attention, which is not declared yet",
    "deepseek_vl_hybrid": "it has two vision towers",
    "video_llava": "it has two vision towers",
    "janus": "it has heads for images and for text",
}
REFUSED_TOWERS = {"t5": "it is an encoder-decoder, and prompt and answer are read as one sequence here"}
