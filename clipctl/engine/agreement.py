"""New weights for the sampler, and the proof that it has them: both engines score one text, and must agree.

The sampler writes the text itself, after a fixed prompt and with fixed draws, so that all that a rollout runs on is under
test: weights, decoding, temperature, and a prefix cache that must not remember the old policy. It is seen on this text that
weights are wrong or missing, not that they are old by less than the tolerance, which is what two engines differ by at all.
"""

from dataclasses import dataclass

import numpy as np

from clipctl.engine import EnginePair
from clipctl.errors import EngineError
from clipctl.ranks import ALONE, Ranks
from clipctl.rollout import Batch, DrawKey, Prompt, SamplingParams
from clipctl.spec import RunSpec

PROBE_KEY = DrawKey(0, -(2**40), 0)
"""Of no rollout and no evaluation."""
SAMPLES, TOKENS = 4, 16
TOLERANCE = {"float32": 0.001, "bfloat16": 0.1}
"""Nats; measured on the embedded model in float32 6e-7, on SmolLM2 in bfloat16 0.03."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked after a push, and how far the answers may be apart: mean |Δ log π| of a token, nats."""

    prompt_ids: list[int]
    params: SamplingParams
    tolerance: float


def make_probe(spec: RunSpec, prompt_ids: list[int], stop_ids: frozenset[int]) -> Probe:
    """The probe of a run. prompt_ids: long enough to fill blocks of a prefix cache, where the run has such."""
    tokens = min(TOKENS, spec.rollout.max_response_tokens)
    tolerance = spec.engine.probe_tolerance
    return Probe(
        prompt_ids,
        SamplingParams(tokens, spec.rollout.temperature, 1.0, stop_ids),
        TOLERANCE[spec.model.dtype] if tolerance is None else tolerance,
    )


def push_weights(engine: EnginePair, version: int, probe: Probe, ranks: Ranks = ALONE) -> None:
    """The trainer's weights to the sampler. Raises EngineError, with the number, where they do not agree after it."""
    engine.sampler.update_weights(engine.trainer.weights(), version)
    check_agreement(engine, version, probe, ranks)


def check_agreement(engine: EnginePair, version: int, probe: Probe, ranks: Ranks = ALONE) -> None:
    """Raises EngineError, with the number, where sampler and trainer do not have the same policy."""
    if engine.shared:
        return
    found = max(disagreements(engine, probe, ranks))
    if not found <= probe.tolerance:
        raise EngineError(
            f"sampler and trainer do not have the same weights: under policy {version} their log-probabilities of a probe text "
            f"differ by {found:.4g} nat a token, and engine.probe_tolerance = {probe.tolerance:g} is allowed"
        )


def disagreements(engine: EnginePair, probe: Probe, ranks: Ranks = ALONE) -> list[float]:
    """Mean over the tokens of a probe text of |log π(trainer) - log π(sampler)|, nats, of each rank's sampler."""
    ((_, group),) = engine.sampler.sample([Prompt(probe.prompt_ids, PROBE_KEY)], SAMPLES, probe.params)
    texts = [completion for group in ranks.gather(group) for completion in group]
    batch = Batch([probe.prompt_ids] * len(texts), [text.token_ids for text in texts], np.zeros(len(texts)), SAMPLES)
    scored_T = engine.trainer.score(batch).logprob_T.double().numpy()
    apart_T = np.abs(scored_T - np.concatenate([text.logprobs for text in texts]))
    of_texts = np.split(apart_T, np.cumsum(batch.lengths_R)[:-1])
    return [float(np.concatenate(of_texts[at : at + SAMPLES]).mean()) for at in range(0, len(texts), SAMPLES)]
