"""Models that are too large for one device: while they train, their weights, gradients and optimiser states are spread over the processes.

Fully sharded data parallelism (Zhao et al., "PyTorch FSDP", 2023, arXiv 2304.11277), as PyTorch's ``fully_shard`` does it: every layer is a
group of its own, gathered for the time of its forward and backward pass. A copy is spread, and what it learned is written back, so nothing
of it stays behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from infoprune.errors import InfoPruneError


def check_sharding() -> None:
    """Whether this PyTorch can.

    Raises:
        InfoPruneError: It is too old.
    """
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: F401

        missing = [name for name in ("set_force_sum_reduction_for_comms", "set_gradient_divide_factor") if not hasattr(FSDPModule, name)]
    except ImportError as error:
        missing = [str(error)]
    if missing:
        raise InfoPruneError(
            f"--shard needs a newer PyTorch than {torch.__version__} ({', '.join(missing)}). Update it, or leave out --shard."
        )


@contextmanager
def spread(model: nn.Module, layers: Sequence[str], device: torch.device) -> Iterator[nn.Module]:
    """A copy of ``model`` on ``device``, its weights spread over all processes; afterwards ``model`` has what the copy learned.

    Args:
        model: The same on all processes; waits in the host's memory meanwhile.
        layers: Paths of the modules that are gathered one at a time; all else is gathered together.
        device: Of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to("cpu")
    working = copy.deepcopy(model)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*(working.get_submodule(path) for path in layers), working]:
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # Terms are shares of the mean over the whole step already, so gradients add up.
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)
    try:
        yield working
        with torch.no_grad():
            targets = dict(model.named_parameters())
            for name, parameter in working.named_parameters():
                if parameter.requires_grad:
                    targets[name].copy_(whole(parameter))
    finally:
        model.to(device)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which this process may hold a part; all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value``, the same on all processes, on the device of ``like`` and spread like it: the inverse of :func:`whole`."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else value
