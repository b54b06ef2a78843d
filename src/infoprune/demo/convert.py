"""Turn the two fetched weight files into ordinary Transformers modules.

The vision file is an ONNX graph (DINOv2-small plus a saliency decoder that is ignored); the language file is a 4-bit GGUF.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Dinov2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from infoprune.errors import CheckpointError

VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
}
# Names that torch.onnx gave to the position-embedding constants of this one pinned file.
_CLS_POSITION, _PATCH_POSITION = "onnx::Concat_1957", "onnx::Reshape_1962"
_PREFIX = "backbone."


def dinov2_state_dict(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Read DINOv2-small from the ONNX graph, under the key names of its public checkpoint.

    Linear weights are anonymous MatMul constants in the graph: each is found through the bias ``Add`` that follows its MatMul,
    and transposed from (in, out) to (out, in).

    Raises:
        CheckpointError: The graph is not the expected one.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    state = {name.removeprefix(_PREFIX): tensor(name) for name in constants if name.startswith(_PREFIX)}
    consumers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in constants:
            continue
        follower = consumers.get(node.output[0])
        bias = next((n for n in follower.input if n.startswith(_PREFIX) and n.endswith(".bias")), None) if follower is not None else None
        if bias is not None:
            state[bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"] = tensor(node.input[1]).T.contiguous()
    try:
        position = torch.cat(
            [tensor(_CLS_POSITION).reshape(1, 1, -1), tensor(_PATCH_POSITION).reshape(1, -1, VISION_CONFIG["hidden_size"])], 1
        )
    except KeyError as error:
        raise CheckpointError(f"{onnx_file} is not the expected graph: it lacks the constant {error}.") from error
    state["embeddings.position_embeddings"] = position
    state["embeddings.mask_token"] = torch.zeros(1, VISION_CONFIG["hidden_size"])
    return state


def dinov2_config() -> Dinov2Config:
    """Configuration of DINOv2-small."""
    return Dinov2Config(**VISION_CONFIG)


def smollm2(gguf_file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Dequantise SmolLM2-135M-Instruct to float32 and rebuild it as a plain, saveable Llama."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        quantised = LlamaForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    finally:
        transformers_logging.set_verbosity(verbosity)
    fields = quantised.config.to_dict()
    fields.pop("quantization_config", None)  # save_pretrained refuses models that carry one
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantised.state_dict())
    return model.eval(), tokenizer
