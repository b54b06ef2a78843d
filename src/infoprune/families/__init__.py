"""Registry of supported model families: one file and one line each."""

from infoprune.families.idefics import IDEFICS2, IDEFICS3, SMOLVLM
from infoprune.families.llava import LLAVA, LLAVA_NEXT, VIPLLAVA

FAMILIES = {family.model_type: family for family in (LLAVA, LLAVA_NEXT, VIPLLAVA, IDEFICS2, IDEFICS3, SMOLVLM)}
