"""The contract of any sampler with any trainer (real vLLM, real DeepSpeed), with the embedded model.

A pair is one line of PAIRS. In float32 on a CPU all engines give one policy's log-probabilities within 1e-4 nat of each
other (measured 1e-5), so the tolerance does not hide other weights: those of the tests move them by 0.1 and more.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from clipctl.engine import EnginePair, open_engine
from clipctl.engine.agreement import check_agreement, disagreements, make_probe, push_weights
from clipctl.errors import EngineError
from clipctl.models import find_model, load_tokenizer, stop_ids
from clipctl.rollout import Batch, Completion, DrawKey, Prompt, SamplingParams
from clipctl.spec import load_spec

PAIRS = [("torch", "torch"), ("vllm", "torch"), ("torch", "deepspeed"), ("vllm", "deepspeed")]
NATS = 1e-4
TINY = find_model("tiny", pull=False)
VOCABULARY = 109
TOKENIZER = load_tokenizer(TINY, None)
STOPS = stop_ids(TINY, TOKENIZER)
TEMPERATURE, LENGTH = 0.8, 12
LONG = [5 + at % 90 for at in range(100)]
"""A prompt of several blocks of a prefix cache."""
TEXTS = ["3 + 4 + 5", "17 + 2 + 9", "1 + 1 + 1", "12 + 30 + 8", "7 + 7 + 70"]
SPEC = {
    "rollout.temperature": TEMPERATURE,
    "rollout.max_response_tokens": 32,
    "engine.sampler_rows": 32,
    "optim.lr": 1e-2,
    "ledger.network_every": 0,
}

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("engines"), pytest.mark.timeout(300)]


def prompts(rollout: int = 0) -> list[Prompt]:
    ids = [*(TOKENIZER.encode_prompt(text) for text in TEXTS), LONG]
    return [Prompt(text, DrawKey(3, rollout, at)) for at, text in enumerate(ids)]


def params(temperature: float = TEMPERATURE, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(LENGTH, temperature, top_p, STOPS)


def sampled(
    pair: EnginePair, asked: list[Prompt], n: int = 4, how: SamplingParams | None = None
) -> list[list[Completion]]:
    """In the order of the prompts."""
    found = dict(pair.sampler.sample(asked, n, how or params()))
    return [found[place] for place in range(len(asked))]


def scored(pair: EnginePair, asked: list[Prompt], groups: list[list[Completion]]) -> np.ndarray:
    """The trainer's log-probabilities of the samples' tokens, flat."""
    size = len(groups[0])
    batch = Batch(
        [prompt.token_ids for prompt in asked for _ in range(size)],
        [completion.token_ids for group in groups for completion in group],
        np.zeros(len(asked) * size),
        size,
    )
    return pair.trainer.score(batch).logprob_T.double().numpy()


def apart(pair: EnginePair, asked: list[Prompt], groups: list[list[Completion]]) -> float:
    """Largest difference of sampler and trainer, nats."""
    own = np.concatenate([completion.logprobs for group in groups for completion in group])
    return float(np.abs(scored(pair, asked, groups) - own).max())


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def change(pair: EnginePair, seed: int) -> None:
    """Other weights for the trainer, of every layer and of the embedding, which is the head too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in pair.trainer.weights():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module", params=PAIRS, ids="/".join)
def pair(request: pytest.FixtureRequest) -> Iterator[EnginePair]:
    sampler, trainer = request.param
    spec = load_spec("tiny", SPEC | {"engine.sampler": sampler, "engine.trainer": trainer})
    opened = open_engine(spec, TINY, 160, print)
    yield opened
    opened.sampler.close()


def test_sampler_and_trainer_have_the_same_log_probabilities(pair: EnginePair) -> None:
    groups = sampled(pair, prompts())
    assert apart(pair, prompts(), groups) < NATS
    assert {completion.finish for group in groups for completion in group} == {"stop", "length"}
    for completion in (completion for group in groups for completion in group):
        assert not STOPS & set(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in STOPS) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.token_ids) == LENGTH


def test_draws_are_keyed(pair: EnginePair) -> None:
    """The same whatever is asked beside them and in whatever order; others in another rollout and in another sample."""
    asked = prompts()
    groups = tokens(sampled(pair, asked))
    some = [asked[at] for at in (4, 0, 2)]
    assert tokens(sampled(pair, some)) == [groups[at] for at in (4, 0, 2)]
    rest = dict(pair.sampler.sample(asked, 4, params(), done={0, 1, 3}))
    assert {place: [one.token_ids for one in group] for place, group in rest.items()} == {
        at: groups[at] for at in (2, 4, 5)
    }
    assert tokens(sampled(pair, asked, n=2)) == [group[:2] for group in groups]
    assert all(one != other for one, other in zip(groups, tokens(sampled(pair, prompts(rollout=1))), strict=True))
    assert len({tuple(one) for one in groups[5]}) == 4


def test_the_next_sample_comes_from_the_new_weights(pair: EnginePair) -> None:
    asked = prompts()
    before = sampled(pair, asked)
    old = scored(pair, asked, before)
    change(pair, seed=1)
    assert np.abs(scored(pair, asked, before) - old).max() > 100 * NATS
    pair.sampler.update_weights(pair.trainer.weights(), version=1)
    after = sampled(pair, asked)
    assert apart(pair, asked, after) < NATS
    assert tokens(after) != tokens(before)


def test_a_step_of_the_trainer_reaches_the_sampler(pair: EnginePair) -> None:
    asked, spec = prompts(), load_spec("tiny", SPEC)
    groups = sampled(pair, asked, n=8)
    advantages = np.tile([1.0, -1.0, 1.0, -1.0, 0.5, -0.5, 1.0, -1.0], len(asked))
    batch = Batch(
        [prompt.token_ids for prompt in asked for _ in range(8)],
        [completion.token_ids for group in groups for completion in group],
        advantages,
        8,
    )
    from clipctl.loss import PolicyLoss

    old = pair.trainer.score(batch)
    pair.trainer.step(batch, range(batch.responses), old, PolicyLoss("clip", 0.2, 0.2))
    probe = make_probe(spec, LONG, STOPS)
    push_weights(pair, 2, probe)
    assert max(disagreements(pair, probe)) < NATS
    assert apart(pair, asked, sampled(pair, asked)) < NATS


def test_first_tokens_follow_the_policy(pair: EnginePair) -> None:
    """Chi-square over the first token of 2000 samples, against the trainer's probability of every token of the vocabulary."""
    n, (prompt, *_) = 2000, prompts(rollout=7)
    (group,) = sampled(pair, [prompt], n, SamplingParams(1, TEMPERATURE, 1.0, STOPS))
    every = [[Completion([token], [0.0], "length") for token in range(VOCABULARY)]]
    expected = n * np.exp(scored(pair, [prompt], every))
    assert expected.sum() == pytest.approx(n, rel=1e-4)
    counts = np.bincount([completion.token_ids[0] for completion in group], minlength=VOCABULARY)
    large = expected >= 5
    seen, wanted = [*counts[large], counts[~large].sum()], [*expected[large], expected[~large].sum()]
    statistic = sum((a - b) ** 2 / b for a, b in zip(seen, wanted, strict=True))
    assert len(seen) > 5
    assert statistic < len(seen) - 1 + 5 * np.sqrt(2 * (len(seen) - 1))


def test_greedy_and_nucleus(pair: EnginePair) -> None:
    asked = prompts()
    (one,), (other,) = (sampled(pair, asked[:1], 1, params(temperature=0.0)) for _ in range(2))
    assert one == other
    assert set(one[0].logprobs) == {0.0}
    whole = sampled(pair, asked, 8)
    cut = sampled(pair, asked, 8, params(top_p=0.5))
    own = np.concatenate([completion.logprobs for group in cut for completion in group])
    # Inside the nucleus probabilities are divided by its mass, at most 1 and at least top_p of it.
    ratio = own - scored(pair, asked, cut)
    assert ratio.min() > -NATS
    assert ratio.max() < np.log(2) + NATS
    assert len({tuple(c.token_ids) for group in cut for c in group}) < len(
        {tuple(c.token_ids) for g in whole for c in g}
    )


def test_weights_that_do_not_arrive_end_the_run_with_the_number(
    pair: EnginePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pair.shared:
        pytest.skip("the sampler reads the trainer's memory")
    probe = make_probe(load_spec("tiny", SPEC), LONG, STOPS)
    pair.sampler.update_weights(pair.trainer.weights(), version=3)
    check_agreement(pair, 3, probe)
    change(pair, seed=2)
    with pytest.raises(
        EngineError, match=r"policy 4 .* differ by \d.* nat a token, and engine.probe_tolerance = 0.001"
    ):
        check_agreement(pair, 4, probe)
    push_weights(pair, 4, probe)
