"""Registry of supported model families: one file and one line each."""

from infoprune.families.idefics3 import IDEFICS3, SMOLVLM
from infoprune.families.llava import LLAVA

FAMILIES = {family.model_type: family for family in (LLAVA, IDEFICS3, SMOLVLM)}
