"""Stock checkpoints beside Transformers 5: what earlier readers look for under other names.

Transformers 4, and servers built on it, read a rotary base from ``rope_theta`` and take their default where that is absent, without a word.
The entries that this version wrote stay; those of before are written beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

GENERIC = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # by today's name
LAYERS = ("full_attention", "sliding_attention")


def keep_original_names_(model: Any) -> None:
    """Have a stock model saved under the names that checkpoints of its family have on hubs.

    Transformers 5 dropped the level ``vision_model`` from the names of CLIP's and SigLIP's towers, and puts it back for models that it read
    from such a checkpoint, not for one that was made from a configuration.
    """
    found = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in found if not isinstance(c, PrefixChange) or c.prefix_to_remove == "vision_model"]


def write_for_older_readers(folder: Path, processor: Any) -> None:
    """Add earlier names to the configuration and to the tokenizer's, and the image processor's file of its own.

    Args:
        folder: Of a stock checkpoint that Transformers 5 wrote.
        processor: Its processor.
    """
    _rewrite(folder / "config.json", with_older_names)
    for file in folder.rglob("tokenizer_config.json"):  # InstructBLIP has two
        _rewrite(file, older_tokenizer)
    processor.image_processor.save_pretrained(folder)
    _rewrite(folder / "preprocessor_config.json", older_image_processor)


def _rewrite(file: Path, change: Any) -> None:
    if file.is_file():
        file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8"))), indent=2) + "\n", encoding="utf-8")


def with_older_names(config: Any) -> Any:
    """A configuration, its sections too, that names precision and rotary embedding in both ways."""
    if not isinstance(config, dict):
        return config
    found = {name: with_older_names(value) if name != "rope_parameters" else value for name, value in config.items()}
    if isinstance(found.get("dtype"), str):
        found.setdefault("torch_dtype", found["dtype"])
    return _older_rope(found["rope_parameters"]) | found if isinstance(found.get("rope_parameters"), dict) else found


def _older_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``; of layers with bases of their own (Gemma 3) also ``rope_local_base_freq``."""
    full, sliding = (parameters.get(kind) for kind in LAYERS)
    flat = full if isinstance(full, dict) else parameters
    older = {name: flat[name] for name in ("rope_theta", "partial_rotary_factor") if name in flat}
    scaling = {name: value for name, value in flat.items() if name not in older}
    plain = set(scaling) <= {"rope_type"} and scaling.get("rope_type", "default") == "default"
    older["rope_scaling"] = None if plain else scaling
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    return older


def older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Class and special tokens under names that both know."""
    found = config | {"tokenizer_class": GENERIC.get(name := config.get("tokenizer_class", ""), name)}
    if isinstance(extra := found.get("extra_special_tokens"), list):
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    return found


def older_image_processor(config: dict[str, Any]) -> dict[str, Any]:
    """The class without today's suffix for its backend."""
    return config | {"image_processor_type": str(config.get("image_processor_type", "")).removesuffix("Pil")}
