"""Float32 masters of 16-bit parameters: what gradients add up in and the optimizer steps, beside the copy that computes."""

from collections.abc import Sequence

import torch
from torch import nn


def master_of(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself in float32, else a float32 copy that the optimizer owns."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


def take_gradients(parameters: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    """Adds the working copy's gradients to the masters' in float32, and removes them."""
    for parameter, master in zip(parameters, masters, strict=True):
        if parameter is not master and parameter.grad is not None:
            assert master.grad is not None
            master.grad.add_(parameter.grad)
            parameter.grad = None


def copy_back(parameters: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    """The masters, rounded, into the working copy."""
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
