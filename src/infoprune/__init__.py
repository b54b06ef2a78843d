"""InfoPrune: information-theoretic compression of vision-language models.

import infoprune

vlm = infoprune.load("demo")
result = infoprune.compress(vlm, "easy-vqa", flops=0.5)
infoprune.save(result.vlm, "small", probe=result.probe)
"""

import os as _os

# Intel's MKL rounds differently with the alignment of its inputs unless told otherwise before its first use; a resumed training run
# could then not end with the same bits.
_os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from infoprune import checkpoint as _checkpoint
from infoprune._version import __version__
from infoprune.checkpoint import save
from infoprune.compress import Compressed, apply_plan, compress
from infoprune.data import Example, load_examples
from infoprune.errors import InfoPruneError
from infoprune.model import VLM, load
from infoprune.options import CompressionOptions
from infoprune.plan import CompressionPlan

_checkpoint.register()

__all__ = [
    "VLM",
    "Compressed",
    "CompressionOptions",
    "CompressionPlan",
    "Example",
    "InfoPruneError",
    "__version__",
    "apply_plan",
    "compress",
    "load",
    "load_examples",
    "save",
]
