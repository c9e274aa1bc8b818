"""The optimizers of `optim.optimizer`, and how each one's step divides among the parts of the gradient.

A step is Δθ = -D·(gradient + memory) - decay. For a function of θ with gradient h, ⟨h, Δθ⟩ is linear in the parts of the
gradient once D is taken as what the step had, so the parts, the memory (`momentum`) and the weight decay (`decay`) add
up to it. Sources: torch.optim.SGD; AdamW, arXiv 1711.05101.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipctl.spec import Optim


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that was just taken, parameter by parameter.

    gradients: as the optimizer had them. parts: what they are made of, in the same scale. before: θ before the step.
    """

    gradients: Sequence[Tensor]
    parts: Mapping[str, Sequence[Tensor]]
    before: Sequence[Tensor]


def split_sgd(slope: Sequence[Tensor], step: Step, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Δθ = -lr·(g + λθ): no memory."""
    (group,) = optimizer.param_groups
    rows = {name: -group["lr"] * dot(slope, part) for name, part in step.parts.items()}
    return rows | {"momentum": 0.0, "decay": -group["lr"] * group["weight_decay"] * dot(slope, step.before)}


def split_adamw(slope: Sequence[Tensor], step: Step, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Δθ = -D·m - lr·λ·θ, m = β₁ m₋ + (1-β₁) g, D = lr / (1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε), v after the step."""
    (group,) = optimizer.param_groups
    beta1, beta2 = group["betas"]
    scaled: list[Tensor] = []
    memory: list[Tensor] = []
    for parameter, h, gradient in zip(group["params"], slope, step.gradients, strict=True):
        state = optimizer.state[parameter]
        count = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
        scaled.append(h * (group["lr"] / (1 - beta1**count)) / root)
        memory.append(state["exp_avg"] - (1 - beta1) * gradient)
    rows = {name: -(1 - beta1) * dot(scaled, part) for name, part in step.parts.items()}
    decay = -group["lr"] * group["weight_decay"] * dot(slope, step.before)
    return rows | {"momentum": -dot(scaled, memory), "decay": decay}


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Σ left·right over all tensors, summed in float64."""
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in zip(left, right, strict=True)))


def open_sgd(parameters: Sequence[Tensor], optim: Optim) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


def open_adamw(parameters: Sequence[Tensor], optim: Optim) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], Optim], torch.optim.Optimizer]] = {
    "adamw": open_adamw,
    "sgd": open_sgd,
}
SPLITS: dict[str, Callable[[Sequence[Tensor], Step, torch.optim.Optimizer], dict[str, float]]] = {
    "adamw": split_adamw,
    "sgd": split_sgd,
}
"""How the step of each optimizer divides among the parts of its gradient."""
