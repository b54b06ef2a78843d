"""Run by two processes: a spread copy holds half of the weights on each, computes as the original does, and gives back what it learned."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from infoprune.training.loop import leave_processes
from infoprune.training.sharding import as_part, spread, whole

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 2))
model[0].requires_grad_(False)
before = {name: p.detach().clone() for name, p in model.named_parameters()}
inputs = torch.randn(6, 4)
expected = model(inputs)
expected.square().sum().backward()
gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
with spread(model, ["1"], torch.device("cpu")) as working:
    parameters = dict(working.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values())
    assert sum(p.to_local().numel() for p in parameters.values()) * 2 == sum(p.numel() for p in before.values())
    part = inputs[torch.distributed.get_rank() :: 2]
    outputs = working(part)
    torch.testing.assert_close(outputs, expected[torch.distributed.get_rank() :: 2])
    outputs.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(whole(parameters[name].grad), gradient)
        assert torch.equal(whole(as_part(gradient, parameters[name])), gradient)
    with torch.no_grad():
        for name in gradients:
            parameters[name].sub_(parameters[name].grad)
for name, p in model.named_parameters():
    torch.testing.assert_close(p.detach(), before[name] - gradients.get(name, 0.0))
print("spread", flush=True)
leave_processes()
