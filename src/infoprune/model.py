"""A vision-language model with everything needed to run it: model, processor, prompt encoder, sites."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file

from infoprune.architecture import Architecture
from infoprune.errors import CheckpointError, InfoPruneError, UnsupportedModelError
from infoprune.packing import PromptEncoder
from infoprune.plan import CompressionPlan
from infoprune.resolve import COMPRESSED, family_of, resolve, supported, towers_of

DEMO = "demo"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


@dataclass(frozen=True)
class VLM:
    """A loaded vision-language model.

    Attributes:
        model: The Transformers model.
        processor: Its processor.
        encoder: Prompts and answers to token ids.
        architecture: Sites of the dense model; ``None`` for a compressed one loaded from disk.
        model_id: Where it came from.
        plan: How it was compressed, if it was.
        stored: Precision of the weights in the checkpoint that it came from, where its configuration tells.
    """

    model: Any
    processor: Any
    encoder: PromptEncoder
    architecture: Architecture | None
    model_id: str
    plan: CompressionPlan | None = None
    stored: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def copy(self) -> VLM:
        """An independent copy of the weights."""
        return replace(self, model=copy.deepcopy(self.model))


def load(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    prompt_suffix: str = "",
    notify: Callable[[str], None] = lambda message: None,
) -> VLM:
    """Load a dense or compressed vision-language model.

    Args:
        source: ``demo``, a local checkpoint folder, or a hub id.
        device: ``cpu``, ``cuda``, ``mps``.
        dtype: Precision to compute in; float32 by default.
        trust_remote_code: Allow code that the checkpoint ships. Never needed for supported families or infoprune checkpoints.
        prompt_suffix: Appended to every question, e.g. a request for a one-word answer.
        notify: Called with one line for people before slow steps.

    Raises:
        CheckpointError: Missing, incomplete or corrupt.
        UnsupportedModelError: No declaration for the family.
    """
    if str(source) == DEMO:
        from infoprune.demo.assemble import ensure_demo

        path: str | Path = ensure_demo(notify)
    else:
        path = _local_or_hub(source)
    model, processor, stored = _from_pretrained(path, source, dtype, trust_remote_code)
    plan = None
    if str(model.config.model_type).startswith(COMPRESSED):
        file = cached_file(str(path), "plan.json", **OPTIONAL)  # beside the weights, also on a hub
        plan = CompressionPlan.read(Path(file)) if file else None
        architecture = None
    else:
        architecture = resolve(model)
    if getattr(model.config, "image_token_id", None) is None:
        raise UnsupportedModelError(f"The model '{source}' names no image token in its configuration.")
    model = model.to(device).eval()
    return VLM(model, processor, prompt_encoder(model, processor, prompt_suffix), architecture, str(source), plan, stored)


def precision_name(dtype: torch.dtype) -> str:
    """A precision's name as configurations and reports have it, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def named_precision(name: str) -> torch.dtype:
    """The precision that a command line calls ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        InfoPruneError: Another name.
    """
    if name not in PRECISIONS:
        raise InfoPruneError(f"There is no precision '{name}'; choose auto, {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def prompt_encoder(model: Any, processor: Any, prompt_suffix: str = "") -> PromptEncoder:
    """The encoder of a dense or compressed model."""
    family = family_of(model)
    rope = getattr(model.model, family.positions) if family.positions else None
    eos = _end_of_answer(processor.tokenizer.eos_token_id, model.get_submodule(family.decoder).generation_config.eos_token_id)
    return PromptEncoder(processor, model.config.image_token_id, prompt_suffix, family=family, rope=rope, eos=eos)


def _end_of_answer(tokenizer: int | None, generation: int | list[int] | None) -> int | None:
    """The tokenizer's end of sequence, but where generation does not stop at it (BLIP-2 with OPT stops at a line break)."""
    stops = generation if isinstance(generation, list) else [generation]
    return tokenizer if tokenizer in stops or stops[0] is None else stops[0]


def _local_or_hub(source: str | Path) -> str | Path:
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"The folder {path} has no config.json; it is not a Transformers checkpoint.")
        _check_whole(path)
        return path
    if path.exists() or path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise CheckpointError(f"There is no checkpoint at '{source}'. Give 'demo', a checkpoint folder, or a hub id like 'org/name'.")
    return str(source)


def _check_whole(path: Path) -> None:
    """A folder must hold safetensors weights, all shards of them, readable; pickled weights are refused."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is not a valid weight index ({error}); the checkpoint is corrupt.") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} points outside its folder: '{shard}'.")
        file = path / shard
        if not file.is_file():
            raise CheckpointError(f"The checkpoint {path} lacks {shard}. Only safetensors weights are read; convert pickled ones first.")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is corrupt or incomplete ({error}). Copy or download it again.") from error


def _from_pretrained(
    path: str | Path, source: str | Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Any, torch.dtype | None]:
    """Model, processor, and the precision that the configuration gives the weights."""
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        towers_of(config)  # before gigabytes of weights are read
        named: Any = config.dtype or config.get_text_config().dtype
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, info = loaded
        processor = AutoProcessor.from_pretrained(path, **options)
    except InfoPruneError:
        raise
    except ValueError as error:
        if "model type" in str(error) or "Unrecognized configuration" in str(error):
            raise UnsupportedModelError(f"'{source}' is not a supported vision-language model. Supported: {supported()}.") from error
        raise CheckpointError(f"The checkpoint '{source}' could not be loaded: {error}") from error
    except Exception as error:  # Transformers raises many kinds here; each means that this checkpoint can't be used
        raise CheckpointError(f"The checkpoint '{source}' could not be loaded: {type(error).__name__}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"The checkpoint '{source}' lacks {len(missing)} weights, the first being '{missing[0]}'. It is incomplete.")
    return model, processor, named if named in PRECISIONS.values() else None
