"""Registry of supported model families, one short declaration each, and of those that are refused."""

from infoprune.families.blip import BLIP2, INSTRUCTBLIP
from infoprune.families.gemma import GEMMA3, PALIGEMMA
from infoprune.families.idefics import IDEFICS_STYLE
from infoprune.families.internvl import INTERNVL
from infoprune.families.llava import LLAVA_STYLE
from infoprune.families.mllama import MLLAMA
from infoprune.families.ovis import OVIS2
from infoprune.families.qwen_vl import QWEN_VL
from infoprune.families.refused import REFUSED, REFUSED_TOWERS

__all__ = ["FAMILIES", "REFUSED", "REFUSED_TOWERS"]

FAMILIES = {
    family.model_type: family
    for family in (*LLAVA_STYLE, *IDEFICS_STYLE, *QWEN_VL, INTERNVL, PALIGEMMA, GEMMA3, MLLAMA, OVIS2, BLIP2, INSTRUCTBLIP)
}
