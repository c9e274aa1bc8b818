"""Whether Triton can build the kernels of the statistics here."""

from subprocess import SubprocessError

import torch

from clipctl.errors import DependencyError, first_line
from clipctl.statistics import token_statistics


def check_triton(device: str = "cuda") -> None:
    """Builds and runs them once, small. Raises DependencyError where Triton, a C compiler or Python's headers are not there."""
    hidden_TD, head_VD = torch.ones(2, 16, device=device, requires_grad=True), torch.ones(32, 16, device=device)
    targets_T = torch.zeros(2, dtype=torch.long, device=device)
    try:
        found = token_statistics(hidden_TD, head_VD, targets_T, kernels="triton")
        (found.logprob_T + found.entropy_T).sum().backward()  # type: ignore[no-untyped-call]
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        raise DependencyError(
            f"engine.statistics = 'triton': its kernels cannot be built here ({first_line(error)}); they need Triton, a C "
            "compiler and Python's headers; --set engine.statistics=torch"
        ) from None
