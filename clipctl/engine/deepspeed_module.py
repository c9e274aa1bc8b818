"""The policy as one module whose forward pass ends in the exact statistics, so that DeepSpeed's hooks see every use of a weight.

With ZeRO-3 a weight is whole only while a module that owns it runs, forward or backward. The statistics multiply by the
language-model head itself, so the head is a module here, which owns it (tied to the embedding or not).
"""

from typing import Any

from torch import Tensor, nn

from clipctl.statistics import Kernels, token_statistics


class StatisticsHead(nn.Module):
    """`token_statistics` with the head as its own weight; gives the fields of `TokenStatistics` in their order."""

    def __init__(self, head_VD: nn.Parameter, temperature: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = head_VD
        self.temperature = temperature
        self.kernels: Kernels = kernels

    def forward(self, hidden_TD: Tensor, targets_T: Tensor, *, whole: bool) -> tuple[Tensor, ...]:
        if not whole:
            # Run all the same: DeepSpeed has begun to gather the weight, because every other pass ends here.
            return hidden_TD, targets_T
        found = token_statistics(hidden_TD, self.weight, targets_T, temperature=self.temperature, kernels=self.kernels)
        return found.logprob_T, found.entropy_T, found.sum_p2_T, found.sum_p2_logp_T, found.expected_q_T


class PolicyModule(nn.Module):
    """A transformers causal LM and its head."""

    def __init__(self, policy: Any, temperature: float, kernels: Kernels) -> None:
        super().__init__()
        self.policy = policy
        self.head = StatisticsHead(policy.lm_head.weight, temperature, kernels)

    def forward(self, ids_BS: Tensor, rows_T: Tensor, columns_T: Tensor, *, whole: bool = True) -> tuple[Tensor, ...]:
        """Statistics of the tokens at (row, column); without `whole` the hidden states that predict them and those tokens."""
        hidden_BSD = self.policy.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        hidden_TD, targets_T = hidden_BSD[rows_T, columns_T - 1], ids_BS[rows_T, columns_T]
        found: tuple[Tensor, ...] = self.head(hidden_TD, targets_T, whole=whole)
        return found
