"""A vision-language model with everything needed to run it: model, processor, prompt encoder, sites."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file, extract_commit_hash

from infoprune.architecture import Architecture
from infoprune.data.images import home_expanded
from infoprune.data.seen import FILE as IMAGES
from infoprune.data.seen import Seen, read_seen
from infoprune.errors import CheckpointError, DataError, InfoPruneError, UnsupportedModelError
from infoprune.plan import CompressionPlan
from infoprune.prompts import QUESTION, PromptEncoder
from infoprune.resolve import COMPRESSED, family_of, resolve, supported, towers_of

DEMO = "demo"
WHOLE = "model.safetensors"  # weights that are not in shards
ANSWER = QUESTION  # stands for an answer in a rendered conversation
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
        revision: Commit of the hub's repository that it came from; ``None`` for folders.
        seen: Digests of the images that it was made with, by their use (:mod:`infoprune.data.seen`).
        certified: Digest of the weights that a certificate was made of, until they are saved.
        trusted: Whether the user allowed code that the checkpoint ships.
    """

    model: Any
    processor: Any
    encoder: PromptEncoder
    architecture: Architecture | None
    model_id: str
    plan: CompressionPlan | None = None
    stored: torch.dtype | None = None
    revision: str | None = None
    seen: Seen = field(default_factory=dict)
    certified: str | None = None
    trusted: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def copy(self) -> VLM:
        """An independent copy of the weights."""
        return replace(self, model=copy.deepcopy(self.model))


def dense_architecture(vlm: VLM) -> Architecture:
    """Its sites.

    Raises:
        UnsupportedModelError: The model is compressed already.
    """
    if vlm.architecture is None:
        raise UnsupportedModelError(
            f"'{vlm.model_id}' is already compressed. Compress the original model instead, with the smaller budget."
        )
    return vlm.architecture


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
    check_device(device)
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
        if plan is not None and plan.shapes() != model.config.infoprune:
            raise CheckpointError(f"The plan.json of '{source}' is not the one that its weights were cut by; restore the original file.")
        images = cached_file(str(path), IMAGES, **OPTIONAL)
        architecture = None
    else:
        _refuse_quantised(model, source)
        # Of what was exported. In a folder: a hub would be asked for two files more of every model.
        exported = Path(path, "plan.json").is_file() and Path(path, IMAGES).is_file()
        images = Path(path, IMAGES) if exported else None
        architecture = resolve(model)
    if getattr(model.config, "image_token_id", None) is None:
        raise UnsupportedModelError(f"The model '{source}' names no image token in its configuration.")
    seen = read_seen(Path(images)) if images else {}
    model = model.to(device).eval()
    encoder = prompt_encoder(model, processor, prompt_suffix)
    _check_prompts(encoder, source)
    revision = extract_commit_hash(cached_file(str(path), "config.json", **OPTIONAL), None)  # what a download's path says
    return VLM(model, processor, encoder, architecture, str(source), plan, stored, revision, seen, trusted=trust_remote_code)


def _refuse_quantised(model: Any, source: str | Path) -> None:
    """Transformers drops the entry where it turned the weights into floating point."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"The weights of '{source}' are quantised (quantization_config), and can be neither cut nor solved for. Compress the original "
            "in 16 or 32 bits, and quantise what comes out."
        )


def check_device(name: str) -> None:
    """Refuse a device that is not there, before anything is read.

    Raises:
        InfoPruneError: PyTorch knows no device of that name, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0]
        raise InfoPruneError(f"The device '{name}' can't be used here: {reason}. Give cpu, cuda (or cuda:1, ...) or mps.") from error
    if device.type == "meta":
        raise InfoPruneError("The device 'meta' holds no values. Give cpu, cuda (or cuda:1, ...) or mps.")


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
    prefix, behind = _around_answers(processor)
    eos = _end_of_answer(processor, behind, model.get_submodule(family.decoder).generation_config.eos_token_id)
    return PromptEncoder(
        processor, model.config.image_token_id, prompt_suffix, answer_prefix=prefix, family=family, rope=rope, eos=eos,
        longest=_places(model),
    )  # fmt: skip


def _places(model: Any) -> dict[str, int]:
    """Tokens that there are learned positions for, by the input's name: beyond them the model fails, turned ones go on."""
    text, questions = model.config.get_text_config(), getattr(model.config, "qformer_config", None)
    found = {"qformer_input_ids": getattr(questions, "max_position_embeddings", None)}
    if getattr(text, "rope_parameters", None) is None:
        found["input_ids"] = getattr(text, "max_position_embeddings", None)
    return {name: places for name, places in found.items() if places is not None}


def _check_prompts(encoder: PromptEncoder, source: str | Path) -> None:
    """The processor must be able to put a question about an image into a prompt; chat templates may be made for texts alone."""
    hint = (
        "Its chat template must take messages whose content is a list of images and texts, as Transformers' processors have them; or save "
        "the processor without one (chat_template = None), and questions are put as the family does without."
    )
    try:
        prompt = encoder.prompt(QUESTION)
        ids = encoder.inputs([prompt], [Image.new("RGB", (224, 224))])["input_ids"]
    except Exception as error:  # templates and processors raise many kinds
        cause = error.__cause__ if isinstance(error, DataError) and error.__cause__ else error
        raise UnsupportedModelError(
            f"The processor of '{source}' can't put a question about an image into a prompt ({type(cause).__name__}: {cause}). {hint}"
        ) from error
    for lacks, what in ((QUESTION not in prompt, "the question"), (encoder.image_token_id not in ids, "the image")):
        if lacks:
            raise UnsupportedModelError(f"Prompts that the processor of '{source}' makes lack {what}. {hint}")


def _end_of_answer(processor: Any, behind: list[int], generation: int | list[int] | None) -> int | None:
    """The token that ends answers: of those that generation stops at, the one that the chat template puts behind an answer.

    Chat models often have several, and end a turn with another one than a text (Gemma, Llama 3). Without a template that tells, it is the
    tokenizer's end of sequence, but where generation does not stop at it (BLIP-2 with OPT stops at a line break). ``behind``: see
    :func:`_around_answers`.
    """
    own = processor.tokenizer.eos_token_id
    stops = [stop for stop in (generation if isinstance(generation, list) else [generation]) if stop is not None]
    told = next((token for token in behind if token in (stops or [own])), None)
    if told is not None:
        return told
    return own if own in stops or not stops else stops[0]


def _around_answers(processor: Any) -> tuple[str | None, list[int]]:
    """What the chat template puts between the prompt and an answer, and ids of what it puts behind.

    ``None`` and nothing where there is no template, it takes no answers, or a dialogue does not go on as its prompt ends.
    """
    if not getattr(processor, "chat_template", None):
        return None, []
    turns = [("user", [{"type": "image"}, {"type": "text", "text": "?"}]), ("assistant", [{"type": "text", "text": ANSWER}])]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = processor.apply_chat_template(messages)
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    except Exception:  # templates raise many kinds; whether prompts can be made is checked elsewhere
        return None, []
    head, answer, behind = text.rpartition(ANSWER)
    if not answer:
        return None, []
    between = head[len(prompt) :] if head.startswith(prompt) else None
    if between and between.strip():
        # A token that marks answers is the answer's to give; more than that is what templates fill in, thoughts that were not had.
        ids = processor.tokenizer(between.strip(), add_special_tokens=False)["input_ids"]
        between = between if len(ids) == 1 and ids[0] in processor.tokenizer.all_special_ids else None
    return between, processor.tokenizer(behind, add_special_tokens=False)["input_ids"]


def _local_or_hub(source: str | Path) -> str | Path:
    path = home_expanded(str(source))
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
    for shard in weight_files(path):
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


def weight_files(folder: Path) -> list[str]:
    """Names of the files that Transformers reads a checkpoint's weights from; others, of an earlier save, may lie beside them."""
    index = folder / "model.safetensors.index.json"
    whole = (folder / WHOLE).is_file()
    return _shards(index) if index.is_file() and not whole else [WHOLE]


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of weights tells of."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
            raise ValueError("weight_map must name a file for each weight")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a valid weight index ({error}); the checkpoint is corrupt.") from error
    return sorted(set(found.values()))


def _refuse_other_weights(path: str | Path, source: str | Path, config: Any) -> None:
    """Weights are what the folder's model.safetensors or its index names: Transformers would read others, pickled ones too, if told to."""
    if getattr(config, "transformers_weights", None) is not None:
        raise CheckpointError(
            f"The configuration of '{source}' names a file of weights of its own ('transformers_weights'). Only model.safetensors and its "
            "shards are read."
        )
    if cached_file(str(path), "adapter_config.json", **OPTIONAL):
        raise CheckpointError(
            f"'{source}' comes with an adapter (adapter_config.json). Merge it into the weights first, with peft's merge_and_unload."
        )


def _from_pretrained(
    path: str | Path, source: str | Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Any, torch.dtype | None]:
    """Model, processor, and the precision that the configuration gives the weights."""
    # Else Transformers asks a public service to convert pickled weights of a hub's repository, and reads what a pull request holds.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    options = {"trust_remote_code": trust_remote_code}  # said either way: Transformers asks at a terminal where it is not told
    try:
        config = AutoConfig.from_pretrained(path, **options)
        towers_of(config)  # before gigabytes of weights are read
        _refuse_other_weights(path, source, config)
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
