"""Write a model, dense or compressed, as graphs for ONNX Runtime or OpenVINO: vision tower, embedding, prefill and decode step.

Prefill and decode read embeddings, so that the caller puts image features in the place of image tokens; see :class:`Graphs`, which does
that with NumPy and the runtime alone. Blocks that were dropped whole have no cache.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from infoprune.checkpoint import check_output_folder, save_processor, written_aside
from infoprune.errors import CheckpointError, InfoPruneError, UnsupportedModelError
from infoprune.export import probe_inputs
from infoprune.model import VLM
from infoprune.modeling_infoprune import ConstantAttention
from infoprune.resolve import family_of

TOLERANCE = 1e-3  # of the largest logit
SHAPES = ((64, 48), (128, 48), (48, 128))  # of images that show whether a processor makes different numbers of tiles
GRAPHS = ("vision", "embed", "prefill", "decode")
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: dict[str, Runtime] = {"onnx": "onnxruntime", "openvino": "openvino"}  # by what is written


class _Vision(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model.model.get_image_features(pixel_values, return_dict=True).pooler_output
        # To go through a tensor's parts would fix their number.
        return features.flatten(0, -2) if isinstance(features, torch.Tensor) else torch.cat([part.flatten(0, -2) for part in features])


class _Language(nn.Module):
    """The language model over embeddings: (1, tokens, hidden) and past keys and values to the last token's logits and all of them."""

    def __init__(self, model: Any, text: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.text, self.layers = model, text, layers

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache: Any = DynamicCache()
        for layer, keys, values in zip(self.layers, past[::2], past[1::2], strict=bool(past)):
            cache.update(keys, values, layer)
        output = self.text(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        logits = self.model.lm_head(output.last_hidden_state[:, -1:])
        return logits, [tensor for layer in self.layers for tensor in (cache.layers[layer].keys, cache.layers[layer].values)]


@torch.no_grad()
def export_graphs(
    vlm: VLM, folder: str | Path, to: str = "onnx", *, overwrite: bool = False, notify: Callable[[str], None] = lambda message: None
) -> Path:
    """Write the graphs ``vision``, ``embed``, ``prefill`` and ``decode`` beside the processor, and check them in their runtime.

    Args:
        vlm: Dense or compressed, in float32 on the CPU.
        folder: Where to.
        to: ``onnx``, or ``openvino`` for OpenVINO's own format.
        overwrite: Replace a folder that holds something.
        notify: Called with one line for people.

    Raises:
        UnsupportedModelError: The family's language model reads more than embeddings and positions, or its tower more than pixels.
        CheckpointError: A package is missing, or what the runtime answers differs from PyTorch.
    """
    if to not in RUNTIMES:
        raise InfoPruneError(f"Unknown format '{to}'. Known: {', '.join(RUNTIMES)}.")
    _require("onnxscript", RUNTIMES[to])
    folder = check_output_folder(folder, source=vlm.model_id, overwrite=overwrite)
    probe = probe_inputs(vlm)
    _check_supported(vlm, probe)
    with written_aside(folder) as aside:
        aside.mkdir()
        _write(vlm, probe, aside, notify)
        if to == "openvino":
            _to_openvino(aside)
        save_processor(vlm.processor, aside)
        notify("running the graphs and comparing logits")
        difference = _difference(vlm, probe, Graphs(aside, RUNTIMES[to]))
        if not difference <= TOLERANCE:
            raise CheckpointError(f"The graphs' logits differ from PyTorch's by {difference:.3g} of the largest one; nothing was kept.")
    return folder


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    if missing := [package for package in packages if find_spec(package) is None]:
        raise CheckpointError(f"This needs {' and '.join(missing)}: pip install onnx {' '.join(missing)}")


def _check_supported(vlm: VLM, probe: dict[str, torch.Tensor]) -> None:
    family = family_of(vlm.model)
    images = sorted(set(probe) - {"input_ids", "attention_mask"})
    text: Any = vlm.model.get_submodule(family.text)
    window = getattr(vlm.model.config.get_text_config(), "sliding_window", None)
    if images != ["pixel_values"] or family.positions or family.token_types or window or family.model_type == "ovis2":
        raise UnsupportedModelError(
            f"'{family.model_type}' models can't be written as graphs yet: graphs take pixel values and count positions one by one, "
            f"this one reads {', '.join(images)}" + (", with a sliding window." if window else ".")
        )
    if family.decoder:
        raise UnsupportedModelError(
            f"'{family.model_type}' models can't be written as graphs yet: a language model with its head inside is not known to them."
        )
    if scaled := {rotary.rope_type for rotary in _rotary(text) if "longrope" in rotary.rope_type}:
        raise UnsupportedModelError(f"Models whose rotary embedding is of type {scaled.pop()} can't be written as graphs yet.")
    if vlm.device.type != "cpu" or next(text.parameters()).dtype != torch.float32:
        raise CheckpointError("ONNX graphs are written from a float32 model on the CPU; load it so.")


def _rotary(text: nn.Module) -> list[Any]:
    """Rotary embeddings that name their kind."""
    return [module for module in text.modules() if isinstance(getattr(module, "rope_type", None), str)]


@contextmanager
def _fixed_rotary(text: Any) -> Iterator[int | None]:
    """Rotary embeddings of type ``dynamic`` as they are within the positions that the model was trained on: their number; else ``None``.

    Beyond these, frequencies depend on how long the context is, which a graph can't follow.
    """
    dynamic = [(rotary, rotary.rope_type, rotary.inv_freq) for rotary in _rotary(text) if "dynamic" in rotary.rope_type]
    for rotary, _, _ in dynamic:
        rotary.rope_type, rotary.inv_freq = "default", rotary.original_inv_freq
    try:
        yield min((int(rotary.original_max_seq_len) for rotary, _, _ in dynamic), default=None)
    finally:
        for rotary, kind, frequencies in dynamic:
            rotary.rope_type, rotary.inv_freq = kind, frequencies


def _layers_with_cache(vlm: VLM) -> list[int]:
    text: Any = vlm.model.get_submodule(family_of(vlm.model).text)
    return [number for number, layer in enumerate(text.layers) if not any(isinstance(m, ConstantAttention) for m in layer.modules())]


def _write(vlm: VLM, probe: dict[str, torch.Tensor], folder: Path, notify: Callable[[str], None]) -> None:
    with _fixed_rotary(vlm.model.get_submodule(family_of(vlm.model).text)) as longest:
        layers = _write_graphs(vlm, probe, folder, notify)
    facts = {"image_token_id": vlm.encoder.image_token_id, "eos_token_id": _stops(vlm), "layers": layers, "longest": longest}
    (folder / "graphs.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write_graphs(vlm: VLM, probe: dict[str, torch.Tensor], folder: Path, notify: Callable[[str], None]) -> list[int]:
    """Returns the layers that have a cache."""
    layers, dynamic = _layers_with_cache(vlm), torch.export.Dim.DYNAMIC
    language = _Language(vlm.model, vlm.model.get_submodule(family_of(vlm.model).text), layers).eval()
    embedding = vlm.model.get_input_embeddings()
    ids = probe["input_ids"]
    embedded, mask, positions = embedding(ids), _causal(ids.shape[1]), torch.arange(ids.shape[1])[None]
    _, past = language(embedded, mask, positions, [])
    step = (embedded[:, -1:], torch.ones(1, 1, 1, ids.shape[1] + 1, dtype=torch.bool), positions[:, -1:] + 1, past)
    cached = [f"{kind}.{layer}" for layer in layers for kind in ("key", "value")]
    sequence = {1: dynamic}
    # Processors may cut images into tiles, into as many as the image's shape asks for.
    pixels = max((probe_inputs(vlm, size)["pixel_values"] for size in SHAPES), key=len)
    tiles = ({0: dynamic},) if len(pixels) > 1 else None
    jobs: dict[str, tuple[nn.Module, tuple[Any, ...], Any, list[str], list[str]]] = {
        "vision": (_Vision(vlm.model).eval(), (pixels,), tiles, ["pixel_values"], ["features"]),
        "embed": (embedding, (ids,), (sequence,), ["input_ids"], ["embeddings"]),
        "prefill": (
            language, (embedded, mask, positions, []), (sequence, {2: dynamic, 3: dynamic}, sequence, []),
            ["embeddings", "mask", "positions"], ["logits", *cached],
        ),
        "decode": (
            language, step, (None, {3: dynamic}, None, [{2: dynamic} for _ in past]),
            ["embeddings", "mask", "positions", *(f"past.{name}" for name in cached)], ["logits", *cached],
        ),
    }  # fmt: skip
    for name, (module, inputs, shapes, names, outputs) in jobs.items():
        notify(f"writing {name}.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            try:
                torch.onnx.export(
                    module, inputs, folder / f"{name}.onnx", dynamo=True, dynamic_shapes=shapes, input_names=names,
                    output_names=outputs, verbose=False,
                )  # fmt: skip
            except torch.onnx.OnnxExporterError as error:
                reason = str(error.__cause__ or error).strip().partition("\n")[0]
                raise UnsupportedModelError(f"PyTorch can't write this model's {name} as a graph ({reason}); nothing was kept.") from error
    return layers


def _causal(tokens: int) -> torch.Tensor:
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()


def _to_openvino(folder: Path) -> None:
    import openvino

    core = openvino.Core()
    for name in GRAPHS:
        openvino.save_model(core.read_model(folder / f"{name}.onnx"), folder / f"{name}.xml", compress_to_fp16=False)
    for path in folder.glob("*.onnx*"):
        path.unlink()


def _difference(vlm: VLM, probe: dict[str, torch.Tensor], graphs: Graphs) -> float:
    """Largest relative difference of logits: after the prompt, and after one more token."""
    ids = probe["input_ids"]
    logits, cache = graphs.prefill(ids.numpy(), probe["pixel_values"].numpy())
    following = torch.cat([ids, torch.tensor([[int(logits.argmax())]])], 1)
    last = graphs.decode(int(following[0, -1]), ids.shape[1], cache)[0]
    inputs = probe | {"input_ids": following, "attention_mask": torch.ones_like(following)}
    expected = vlm.model(**inputs, use_cache=False).logits[0, -2:].numpy()
    return float(np.abs(np.stack([logits, last]) - expected).max() / np.abs(expected).max())


@dataclass
class Graphs:
    """The graphs of a folder, run by ONNX Runtime or OpenVINO on the CPU; batch of one. OpenVINO reads ONNX as well as its own format.

    Attributes:
        folder: Of :func:`export_graphs`.
        runtime: What runs them.
        threads: For the runtime; ``None``: its own choice.
    """

    folder: Path
    runtime: Runtime = "onnxruntime"
    threads: int | None = None
    _run: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require(self.runtime)
        try:
            self._facts = json.loads((self.folder / "graphs.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.folder} holds no graphs that can be read ({error}). Write them with 'infoprune export'."
            ) from error
        make = {"onnxruntime": _onnxruntime, "openvino": _openvino}[self.runtime]
        self._run = {name: make(self._file(name), self.threads) for name in GRAPHS}

    def _file(self, name: str) -> Path:
        path = self.folder / f"{name}.xml" if (self.folder / f"{name}.xml").is_file() else self.folder / f"{name}.onnx"
        if not path.is_file() or (path.suffix == ".xml" and self.runtime != "openvino"):
            raise CheckpointError(f"{self.folder} has no {name}.onnx. Write it with 'infoprune export --to onnx'.")
        return path

    def features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Image features (image tokens, hidden) of pixel values."""
        return self._run["vision"]([pixel_values])[0]

    def prefill(self, input_ids: np.ndarray, pixel_values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (vocabulary,) after a prompt (1, tokens), and the cache."""
        embeddings = self._run["embed"]([input_ids])[0].copy()
        image, features = input_ids == self._facts["image_token_id"], self.features(pixel_values)
        if int(image.sum()) != len(features):
            raise InfoPruneError(f"The prompt has {int(image.sum())} image tokens, and the image {len(features)} features.")
        embeddings[image] = features
        tokens = input_ids.shape[1]
        self._check_length(tokens)
        logits, *cache = self._run["prefill"]([embeddings, np.tri(tokens, dtype=bool)[None, None], np.arange(tokens)[None]])
        return logits[0, -1], cache

    def decode(self, token: int, position: int, cache: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (vocabulary,) after one more token at ``position``, and the longer cache."""
        self._check_length(position + 1)
        embedding = self._run["embed"]([np.array([[token]])])[0]
        mask = np.ones((1, 1, 1, position + 1), dtype=bool)
        logits, *cache = self._run["decode"]([embedding, mask, np.array([[position]]), *cache])
        return logits[0, -1], cache

    def _check_length(self, tokens: int) -> None:
        longest = self._facts.get("longest")
        if longest is not None and tokens > longest:
            raise InfoPruneError(f"These graphs hold for contexts of at most {longest} tokens, and this one has {tokens}.")

    def generate(self, input_ids: np.ndarray, pixel_values: np.ndarray, max_new_tokens: int = 16) -> list[int]:
        """Greedy answer, without the token that ends it."""
        logits, cache = self.prefill(input_ids, pixel_values)
        answer: list[int] = []
        stops = self._facts["eos_token_id"]
        while int(logits.argmax()) not in (stops if isinstance(stops, list) else [stops]):
            answer.append(int(logits.argmax()))
            if len(answer) == max_new_tokens:
                break
            logits, cache = self.decode(answer[-1], input_ids.shape[1] + len(answer) - 1, cache)
        return answer


def _stops(vlm: VLM) -> list[int]:
    """Ids that end an answer: what the model's generation stops at, and the end that answers are scored with."""
    named = vlm.model.generation_config.eos_token_id
    return sorted({vlm.encoder.end, *(named if isinstance(named, list) else [] if named is None else [named])})


def _onnxruntime(path: Path, threads: int | None) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _openvino(path: Path, threads: int | None) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    return lambda inputs: [output.copy() for output in compiled(inputs).values()]
