"""Save and register compressed models: safetensors, a unique ``model_type``, the code beside the weights, the plan, the processor."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
)

from infoprune import modeling_infoprune as modeling
from infoprune.certification.certificate import FILE as CERTIFICATE
from infoprune.certification.certificate import Certificate, plan_digest, stored_digest
from infoprune.data.images import home_expanded
from infoprune.data.seen import write_seen
from infoprune.errors import CheckpointError, InfoPruneError, out_of_memory
from infoprune.evaluation.record import weights_digest
from infoprune.families import FAMILIES
from infoprune.geometry import state_geometry_
from infoprune.model import DEMO, VLM, load, precision_name
from infoprune.report.model_card import base_licence, model_card

TOLERANCE = 1e-4  # of the largest logit, or of 1
FILES = "files.json"  # in every folder that this library wrote: what it wrote there
COMPILED = re.compile(r"__pycache__/[^/]+\.pyc")  # of the code that travels along, once it was imported


def register() -> None:
    """Make Transformers' Auto classes know compressed models; runs on ``import infoprune``."""
    for model_type in FAMILIES:
        if model_type not in CONFIG_MAPPING:  # this version of Transformers does not know the family
            continue
        config, base, conditional = classes(model_type)
        # Whatever saves or pushes a model from now on takes the code along.
        for cls, auto in ((config, "AutoConfig"), (base, "AutoModel"), (conditional, "AutoModelForImageTextToText")):
            cls.register_for_auto_class(auto)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForImageTextToText.register(config, conditional, exist_ok=True)


def classes(model_type: str) -> tuple[Any, Any, Any]:
    """Configuration, base model and conditional-generation model of the compressed counterpart of a dense family.

    Where the language model keeps its head, the family's base model is no part of the other, and that one stands for both.
    """
    dense: Any = CONFIG_MAPPING[model_type]
    conditional = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[dense]
    found: tuple[Any, ...] = (dense, conditional if FAMILIES[model_type].decoder else MODEL_MAPPING[dense], conditional)
    config, base, conditional = (getattr(modeling, f"{modeling.PREFIX}{cls.__name__}") for cls in found)
    return config, base, conditional


def check_output_folder(folder: str | Path, *, source: str | Path = "", overwrite: bool = False) -> Path:
    """Refuse a folder that can't or must not be written, before any work is done.

    Args:
        folder: Where a model is to be written.
        source: The model that it is made from, which may not be in there.
        overwrite: Whether an earlier output may be replaced.

    Returns:
        Its absolute path, links in it unresolved.

    Raises:
        CheckpointError: It is not empty (with ``overwrite``: and holds no earlier output, or other files beside it), it contains the source
            model or the folder one is in, a file system is mounted there, its parent can't be written, or its name is the demo model's.
    """
    if str(folder) == DEMO:
        raise CheckpointError(f"'{DEMO}' names the built-in model, so nothing would read the output by that name. Give it another one.")
    folder = Path(os.path.abspath(home_expanded(str(folder))))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} exists and is not a folder.")
    original = home_expanded(str(source)) if source else None
    if original is not None and original.exists() and original.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"The output folder {folder} is the model's own folder, or contains it. Choose another one; sources are never modified."
        )
    if Path.cwd().is_relative_to(folder.resolve()):
        raise CheckpointError(f"The output folder {folder} is the one that you are in, or contains it. Give it a name of its own.")
    if folder.is_mount():
        raise CheckpointError(f"A file system is mounted at the output folder {folder}, so nothing can take its place. Give one in it.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise CheckpointError(f"The output folder {folder} is not empty. Choose another one, or pass --overwrite.")
        _check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-"):
            pass
    except OSError as error:
        raise CheckpointError(f"Cannot write to {folder.parent}: {error.strerror or error}.") from error
    return folder


def _check_replaceable(folder: Path) -> None:
    """Whether all that is in ``folder`` was written by this library, as its list says."""
    try:
        written = json.loads((folder / FILES).read_text(encoding="utf-8"))
        if not isinstance(written, list):
            raise ValueError("it is no list")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The output folder {folder} holds no {FILES} that lists an output's files ({error}), so it is no earlier output of this "
            "version, and --overwrite would delete what is in it. Delete it yourself, or choose another one."
        ) from error
    found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    others = [file for file in found if file not in written and not COMPILED.fullmatch(file)]
    if others:
        raise CheckpointError(
            f"The output folder {folder} holds {others[0]}, which is no part of an output, and --overwrite would delete it. Move it, or "
            "choose another folder."
        )


@torch.no_grad()
def save(
    vlm: VLM,
    folder: str | Path,
    *,
    probe: dict[str, torch.Tensor] | None = None,
    extra: dict[str, Any] | None = None,
    certificate: Certificate | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write a compressed model so that it loads everywhere, verify it, and only then put it in place.

    Args:
        vlm: A compressed model (it has a plan).
        folder: Where to; must not hold anything.
        probe: Model inputs; the reloaded checkpoint must give the same logits on them.
        extra: Written as ``report.json``; its figures also go into the model card, ``README.md``.
        certificate: Of :func:`infoprune.compress`; written as ``certificate.json`` and shown in the model card.
        dtype: Precision of the saved weights; ``None``: that of the checkpoint which the model was loaded from, or with a certificate,
            which is of the weights as they are, the model's own. The model's weights are rounded to it, so that what is saved is what
            one has.
        overwrite: Replace a folder that holds something.
        notify: Called with one line for people.

    Raises:
        CheckpointError: Not compressed, the certificate is another model's or of weights before rounding, folder not empty, disk full,
            or the reloaded model differs; nothing is left behind.
    """
    if vlm.plan is None:
        raise CheckpointError("This model has no compression plan; save an uncompressed model with its own save_pretrained.")
    if certificate is not None and certificate.plan != plan_digest(vlm.plan):
        raise CheckpointError("The certificate is of another plan than this model's.")
    written = dtype or (None if certificate is not None else vlm.stored) or vlm.model.dtype
    rounded = None if written == vlm.model.dtype else written
    if certificate is not None and rounded is not None:
        raise CheckpointError(
            f"The certificate is of weights in {precision_name(vlm.model.dtype)}; they can't be saved in {precision_name(rounded)}."
        )
    if certificate is not None and vlm.certified not in (None, weights_digest(vlm.model)):
        raise CheckpointError("The model's weights have changed since they were certified, so the certificate says nothing of them.")
    folder = check_output_folder(folder, source=vlm.model_id, overwrite=overwrite)
    with written_aside(folder) as aside:
        _write(vlm, aside, rounded)
        (aside / "plan.json").write_text(vlm.plan.to_json(), encoding="utf-8")
        write_seen(aside, vlm.seen)
        if extra is not None:
            (aside / "report.json").write_text(json.dumps(extra, indent=2) + "\n", encoding="utf-8")
        if certificate is not None:
            certificate = certificate.model_copy(update={"weights": stored_digest(aside)})
            (aside / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
        card = model_card(vlm.plan, extra, certificate, licence=base_licence(vlm.model_id))
        (aside / "README.md").write_text(card, encoding="utf-8")
        if probe is not None:
            notify("reloading the checkpoint and comparing logits")
            _verify(vlm, aside, probe, notify)
    return folder


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` at the end of the block; if the block fails, all is as it was.

    Args:
        folder: An absolute path, from :func:`check_output_folder`.

    Raises:
        CheckpointError: Writing failed.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as scratch:
        aside = Path(scratch) / folder.name
        try:
            yield aside
            written = [file.relative_to(aside).as_posix() for file in aside.rglob("*") if not file.is_dir()]
            (aside / FILES).write_text(json.dumps(sorted([*written, FILES]), indent=1) + "\n", encoding="utf-8")
            _put_in_place(aside, folder, Path(scratch) / "replaced")
        except (OSError, SafetensorError) as error:  # the safetensors library reports a full disk as its own error type
            raise CheckpointError(
                f"The checkpoint could not be written to {folder}: {error}. Is the disk full? Nothing was kept."
            ) from error


def _put_in_place(aside: Path, folder: Path, replaced: Path) -> None:
    """Rename ``aside`` to ``folder``; what is there goes to ``replaced`` and comes back if that fails."""
    if not folder.exists():
        aside.rename(folder)
        return
    try:
        folder.rename(replaced)
        aside.rename(folder)
    except BaseException:
        if replaced.exists() and not folder.exists():  # Ctrl-C may also come behind either
            replaced.rename(folder)
        raise


def _write(vlm: VLM, folder: Path, rounded: torch.dtype | None) -> None:
    """Weights, in the precision ``rounded`` if that is given, configuration and processor."""
    assert vlm.plan is not None
    config_class, base, conditional = classes(vlm.plan.model_type)
    fields = vlm.model.config.to_dict()
    fields.pop("model_type", None)
    # Transformers adds the configuration's class and the saved one by itself.
    auto_map = {"AutoModel": f"{modeling.__name__.rpartition('.')[2]}.{base.__name__}"}
    config = config_class.from_dict(
        fields | {"infoprune": vlm.plan.shapes(), "architectures": [conditional.__name__], "auto_map": auto_map}
    )
    state_geometry_(config, vlm.plan, FAMILIES[vlm.plan.model_type].text)
    model = vlm.model
    dense_class, dense_config = type(model), model.config
    # The weights already have the plan's shapes; giving the object its final class for the time of the call spares a second copy of them.
    model.__class__, model.config = conditional, config
    try:
        # Not the family's legacy key names: those are only understood under its own model_type.
        weights = None if rounded is None else rounded_(model, rounded)
        model.save_pretrained(folder, state_dict=weights, save_original_format=False)
    finally:
        model.__class__, model.config = dense_class, dense_config
    if rounded is not None:
        restate_precision_(folder, rounded)
    save_processor(vlm.processor, folder)


def save_processor(processor: Any, folder: Path) -> None:
    """Its files, free of how the last call made its tokenizers pad and truncate, which others would take for their own ways."""
    for tokenizer in (part for part in vars(processor).values() if hasattr(part, "backend_tokenizer")):  # InstructBLIP has two
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else it would be read off the state that is gone
    processor.save_pretrained(folder)


def rounded_(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Round a model's floating-point weights to ``dtype`` in place; returns its state in that precision, tied weights still tied."""
    state = in_precision(model.state_dict(), dtype)
    for name, value in model.state_dict().items():
        value.copy_(state[name])
    return state


def in_precision(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A copy of ``state`` with its floating-point tensors in ``dtype``; those that share their storage still do."""
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}  # by place and shape: all tensors without entries are at the same place
    found = {}
    for name, value in state.items():
        place = value.data_ptr(), value.shape
        if value.is_floating_point() and place not in made:
            made[place] = value.to(dtype)
        found[name] = made[place] if value.is_floating_point() else value
    return found


def restate_precision_(folder: Path, dtype: torch.dtype) -> None:
    """Let the configuration in ``folder`` name the precision that its weights are saved in."""
    file = folder / "config.json"
    file.write_text(json.dumps(_restated(json.loads(file.read_text()), precision_name(dtype)), indent=2) + "\n", encoding="utf-8")


def _restated(config: Any, dtype: str) -> Any:
    """A configuration whose every ``dtype`` is another; Transformers writes that of the model in memory."""
    if isinstance(config, dict):
        return {key: dtype if key == "dtype" and value else _restated(value, dtype) for key, value in config.items()}
    return [_restated(item, dtype) for item in config] if isinstance(config, list) else config


def _verify(vlm: VLM, folder: Path, probe: dict[str, torch.Tensor], notify: Callable[[str], None]) -> None:
    """Compare the checkpoint, loaded again, with the model in memory; to be told where there is no memory for a second one."""
    expected = vlm.model(**probe).logits
    try:
        reloaded = load(folder, device=str(vlm.device), dtype=expected.dtype, trust_remote_code=vlm.trusted)
        difference = float((reloaded.model(**probe).logits - expected).abs().max())
    except (InfoPruneError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        notify("Warning: the memory is not enough to load the checkpoint beside the model; it was saved, and not compared.")
        return
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise CheckpointError(
            f"The reloaded checkpoint differs from the compressed model by {difference:.3g} in its logits; nothing was kept."
        )
