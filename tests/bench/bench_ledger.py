"""What the ledger costs: optimizer steps with everything that is stored of them, against bare steps.

    python tests/bench/bench_ledger.py [--case tiny smollm2-arith] [--rollouts 20]

A bare step makes the same statistics in its forward pass and takes the same step, and returns nothing but the loss: no
counts, terms, masses, extremes, KL or histograms. Rollouts of updates of both kinds take turns in one process on the same
batch with weights that go on moving, the making of the stored rows and the writing of the histograms, fsync and all,
included; the figure is the median of the ratios, so
what else the machine does falls on both. `probe` and
`network` are the cost of one update that is measured so, in bare updates. One thread unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import math
import os
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from clipctl import load_spec
from clipctl.engine import Measure, Scores
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.masters import take_gradients
from clipctl.engine.passes import set_up_torch, update_tokens
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.loss import PolicyLoss
from clipctl.models import find_model, load_causal_lm
from clipctl.records import Update, histogram_columns, update_columns
from clipctl.rollout import Batch, DrawKey, minibatches, spread_states
from clipctl.segments import write_segment
from clipctl.spec import RunSpec

CASES = {"tiny": (8, 12, 48), "smollm2-arith": (150, 24, 49152)}
"""Prompt and response tokens, vocabulary; everything else is the preset's."""


class BareTrainer(TorchTrainer):
    """Takes the same steps and keeps nothing of them."""

    def bare_step(self, batch: Batch, rows: range, old: Scores, loss: PolicyLoss) -> float:
        tokens = update_tokens(batch, rows, old, self.spec, self.masters[0].device)
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
                take_gradients(self.parameters, self.masters)
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


def measure(case: str, blocks: int, journal: Path) -> None:
    spec, trainer, batch = make(case)
    loss = PolicyLoss("clip", spec.clip.low, spec.clip.high)
    old = trainer.score(batch)
    trainer.keep_probe(batch, spread_states(batch.lengths_R, spec.ledger.probe_states, DrawKey(0, 0, 0)))
    steps = spec.optim.epochs * minibatches(batch.responses, spec.optim.responses_per_update)

    def bare() -> float:
        started = perf_counter()
        for rows in steps:
            trainer.bare_step(batch, rows, old, loss)
        return perf_counter() - started

    def whole() -> float:
        started = perf_counter()
        done = [trainer.step(batch, rows, old, loss) for rows in steps]
        sums = loss.sums([result.loss for result in done], [result.tokens for result in done])
        updates = [
            Update(rows, loss, result.grad_norm, its_sums, None, loss.clipped(result.tokens))
            for rows, result, its_sums in zip(steps, done, sums, strict=True)
        ]
        update_columns(updates, spec.optim.lr)
        keys = {"run_id": ["bench"], "attempt": [0], "rollout": [0]}
        columns = histogram_columns(updates)
        rows = len(columns["tokens"])
        write_segment(journal, "histograms-000-000000", "histograms", {k: v * rows for k, v in keys.items()} | columns)
        return perf_counter() - started

    def measured(way: Measure) -> float:
        started = perf_counter()
        trainer.step(batch, steps[0], old, loss, way)
        return perf_counter() - started

    bare(), whole()
    ratios, seconds = [], []
    for block in range(blocks):
        # Who goes first alternates: the machine drifts.
        first, second = (bare, whole) if block % 2 else (whole, bare)
        timed = {first: first(), second: second()}
        ratios.append(timed[whole] / timed[bare])
        seconds.append(timed[bare] / len(steps))
    one = statistics.median(seconds)
    quarters = statistics.quantiles(ratios, n=4)
    print(f"{case}: bare update {1000 * one:.1f} ms; with everything stored {100 * (quarters[1] - 1):+.2f} % "
          f"(quartiles {100 * (quarters[0] - 1):+.2f} … {100 * (quarters[2] - 1):+.2f}, {blocks} rollouts each)")  # fmt: skip
    for way in ("probe", "network"):
        extra = statistics.median(measured(way) for _ in range(5)) / one
        print(f"{case}: an update with {way} = {extra:.1f} bare updates; {len(steps)} updates a rollout")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rollouts", type=int, default=20)
    options = parser.parse_args()
    for case in options.case:
        with TemporaryDirectory() as folder:
            measure(case, options.rollouts, Path(folder))
