"""What the ledger costs: optimizer steps with everything that is stored of them, against bare steps.

    python tests/bench/bench_ledger.py [--case tiny smollm2] [--pairs 60]

A bare step makes the same statistics in its forward pass and takes the same step, and returns nothing but the loss: no
counts, terms, masses, extremes, KL or histograms. Both take turns in one process on the same batch with weights that go
on moving; the figure is the median of the pairs' ratios, so what else the machine does falls on both. `probe` and
`network` are the cost of one update that is measured so, in bare updates. One thread unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import math
import os
import statistics
from time import perf_counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from clipctl import load_spec
from clipctl.engine import Measure, Scores
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.torch_trainer import TorchTrainer, set_up_torch
from clipctl.loss import PolicyLoss
from clipctl.models import find_model, load_causal_lm
from clipctl.rollout import Batch, DrawKey, minibatches, spread_states
from clipctl.spec import RunSpec

CASES = {"tiny": (8, 12, 48), "smollm2-arith": (150, 24, 49152)}
"""Prompt and response tokens, vocabulary; everything else is the preset's."""


class BareTrainer(TorchTrainer):
    """Takes the same steps and keeps nothing of them."""

    def bare_step(self, batch: Batch, rows: range, old: Scores, loss: PolicyLoss) -> float:
        tokens = self._tokens(batch, rows, old)
        for master in self.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        values = []
        lengths_R = batch.lengths_R[rows.start : rows.stop]
        ends = np.cumsum(lengths_R)
        for part, live in self._layout(batch, rows):
            local = [row - rows.start for row in part]
            at_T = torch.cat([torch.arange(ends[row] - lengths_R[row], ends[row]) for row in local])
            with torch.set_grad_enabled(live):
                logprob_T = self._forward(batch, part).logprob_T
                given = (tokens.old_logprob_T[at_T], tokens.advantages_T[at_T].float(), tokens.weights_T[at_T].float())
                value = loss(logprob_T, *given)
            if live:
                value.backward()  # type: ignore[no-untyped-call]
                self._gather_gradients()
            values.append(value.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.spec.optim.grad_clip))
        assert math.isfinite(norm)
        self._move()
        return float(sum(values))


def make(case: str) -> tuple[RunSpec, BareTrainer, Batch]:
    spec = load_spec(case)
    set_up_torch(spec.engine)
    prompt, response, vocabulary = CASES[case]
    rng = np.random.default_rng(0)
    size, groups = spec.rollout.group_size, spec.rollout.prompts
    prompts = [rng.integers(8, vocabulary, prompt).tolist() for _ in range(groups)]
    advantages = rng.integers(0, 2, (groups, size)).astype(float)
    advantages -= advantages.mean(1, keepdims=True)
    batch = Batch(
        [ids for ids in prompts for _ in range(size)],
        [rng.integers(8, vocabulary, response).tolist() for _ in range(groups * size)],
        advantages.ravel(),
        size,
    )
    model = use_grouped_attention(load_causal_lm(find_model(spec.model.path, pull=True), spec.model.dtype, "cpu"))
    return spec, BareTrainer(model, spec), batch


def measure(case: str, pairs: int) -> None:
    spec, trainer, batch = make(case)
    loss = PolicyLoss("clip", spec.clip.low, spec.clip.high)
    old = trainer.score(batch)
    trainer.keep_probe(batch, spread_states(batch.lengths_R, spec.ledger.probe_states, DrawKey(0, 0, 0)))
    steps = minibatches(batch.responses, spec.optim.responses_per_update)

    def seconds(at: int, way: Measure | None) -> float:
        rows = steps[at % len(steps)]
        started = perf_counter()
        if way is None:
            trainer.bare_step(batch, rows, old, loss)
        else:
            trainer.step(batch, rows, old, loss, way)
        return perf_counter() - started

    for way in (None, "sums"):
        seconds(0, way)
    ratios, bare = [], []
    for pair in range(pairs):
        # Who goes first alternates: the second of a pair finds warmer caches.
        order: list[Measure | None] = [None, "sums"] if pair % 2 else ["sums", None]
        timed = {way: seconds(pair, way) for way in order}
        ratios.append(timed["sums"] / timed[None])
        bare.append(timed[None])
    one = statistics.median(bare)
    quarters = statistics.quantiles(ratios, n=4)
    print(f"{case}: bare update {1000 * one:.1f} ms; with all sums {100 * (quarters[1] - 1):+.2f} % "
          f"(quartiles {100 * (quarters[0] - 1):+.2f} … {100 * (quarters[2] - 1):+.2f})")  # fmt: skip
    for way in ("probe", "network"):
        extra = [seconds(pair, way) / seconds(pair, None) for pair in range(max(2, pairs // 20))]
        print(f"{case}: an update with {way} = {statistics.median(extra):.1f} bare updates")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    for case in options.case:
        measure(case, options.pairs)
