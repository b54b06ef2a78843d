"""Families that are known and refused, by ``model_type``, and why."""

_EXPERTS = "its FFNs are banks of experts, which factorisation and the FLOPs count do not know"
_NO_TOWER = "it has no vision tower beside the language model: image patches or codes are its tokens"
_FRAMES = "its Q-Former reads several frames of a video, and questions are asked about one image here"
_CONTRASTIVE = "it is a dual encoder without answers; contrastive objectives are not built yet"
_FUSED = "its language model fuses gate and up projection, which is not declared yet"
_TIMM = "its vision tower comes from timm, whose parts are not declared"
_LINEAR = "its language model mixes linear attention with attention, which is not declared yet"
_CONVOLUTIONS = "its language model mixes convolutions with attention, which is not declared yet"
_ENCODER_DECODER = "its answers come from a decoder with cross-attention to an encoder, which is not declared yet"
_NORMED_HEADS = "its language model normalises the contexts of all heads together, so that none can be removed alone"
_AUDIO = "it has an audio tower beside the vision tower, which is not declared yet"
_TWO_TOWERS = "it has two vision towers"
_WINDOWED = "its vision tower adds relative positions to every head of fused windowed attention, which is not declared yet"
_UNTRIED = "its parts are near those of supported families, but it has not been declared and tested yet"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5_moe", "qwen4_exp", "qwen3_omni_moe_thinker", "ernie4_5_vl_moe", "glm4v_moe"), _EXPERTS),
    **dict.fromkeys(("llama4", "aria", "glm5_next", "kimi_k25", "minimax_m3_vl", "mistral4", "mistral_large4", "step3p7"), _EXPERTS),
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr", "dots3_note", "inkling_mm_model", "inkling2", "muse_spark"), _EXPERTS),
    **dict.fromkeys(("fuyu", "chameleon", "emu3", "gemma4_unified"), _NO_TOWER),
    "instructblipvideo": _FRAMES,
    **dict.fromkeys(("clip", "siglip", "siglip2", "metaclip_2", "align"), _CONTRASTIVE),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr", "phi4_multimodal"), _FUSED),
    **dict.fromkeys(("perception_lm", "fast_vlm", "gemma3n"), _TIMM),
    **dict.fromkeys(("qwen3_5", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _LINEAR),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl"), _CONVOLUTIONS),
    **dict.fromkeys(("t5gemma2", "udop", "pix2struct", "pp_formulanet", "vision-encoder-decoder"), _ENCODER_DECODER),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _NORMED_HEADS),
    **dict.fromkeys(("deepseek_vl_hybrid", "video_llava"), _TWO_TOWERS),
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), _WINDOWED),
    **dict.fromkeys(("cohere_compass", "cosmos3_edge", "cosmos3_omni", "exaone4_5", "granite_docling", "hunyuan_vl"), _UNTRIED),
    **dict.fromkeys(("hyperclovax_vision_v2", "llava_next_video", "paddleocr_vl", "qianfan_ocr", "video_llama_3"), _UNTRIED),
    "blip": "its layers have two attention blocks each, `generate` reads another prompt than the forward pass, and its VQA model is an "
    "encoder-decoder",
    "git": "its language model is a BERT that reads the image's tokens first, which is not declared yet",
    "florence2": "its vision tower attends over windows and over channels in turn, and its language model is an encoder-decoder",
    "idefics": "its language model puts layers of gated cross-attention between its own, which is not declared yet",
    "granite4_vision": "windowed Q-Formers feed several of its language layers, which is not declared yet",
    "gemma4": "its language layers differ in the width of their heads and may share keys and values, which is not declared yet",
    "diffusion_gemma": "it writes an answer's tokens by diffusion, not one after another",
    "muse_glimmer": "its attention is gated by a further projection of every head, which is not declared yet",
    "molmo2": "its images are pooled by cross-attention of patches of several layers, which is not declared yet",
    "nemotron_h_omni": "its language model mixes state-space layers with attention, which is not declared yet",
    "qwen2_5_omni_thinker": _AUDIO,
    "shieldgemma2": "it sorts images by policies, by the probability of one word, and gives no answers",
    "evolla": "it reads proteins, not images",
    "pi0": "it gives a robot's movements, not answers",
    "janus": "it has heads for images and for text",
}
REFUSED_TOWERS = {"t5": "it is an encoder-decoder, and prompt and answer are read as one sequence here"}
