"""Every shipped preset loads, and the paper's have Table 1's values."""

import math

import pytest

from clipctl.models import model_shape
from clipctl.plan import make_plan
from clipctl.spec import load_spec, preset_names, preset_text
from clipctl.tasks import TASKS

PAPER = {
    "qwen1.5b-random": ("Qwen/Qwen2.5-1.5B-Instruct", "gsm8k", "bernoulli", 0.2),
    "llama1b-random": ("meta-llama/Llama-3.2-1B-Instruct", "gsm8k", "bernoulli", 0.2),
    "olmo1b-random": ("allenai/OLMo-2-0425-1B-Instruct", "gsm8k", "bernoulli", 0.1),
    "qwen3b-gsm8k": ("Qwen/Qwen2.5-3B-Instruct", "gsm8k", "gsm8k", 0.2),
    "llama8b-gsm8k": ("meta-llama/Meta-Llama-3-8B-Instruct", "gsm8k", "gsm8k", 0.2),
    "qwen7b-dapo": ("Qwen/Qwen2.5-7B-Instruct", "dapo-math-17k", "math", 0.2),
}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    spec = load_spec(name)
    assert spec.data.task in TASKS
    assert spec.updates_per_rollout > 1
    assert preset_text(name).startswith("# ")


@pytest.mark.parametrize("name", PAPER)
def test_table_1(name: str) -> None:
    spec = load_spec(name)
    model, task, reward, eps = PAPER[name]
    dapo = task == "dapo-math-17k"
    assert (spec.model.path, spec.data.task, spec.reward.kind) == (model, task, reward)
    assert (spec.clip.low, spec.clip.high) == (eps, eps)
    assert (spec.rollout.prompts, spec.rollout.group_size, spec.responses) == (512, 8, 4096)
    assert (spec.optim.responses_per_update, spec.optim.epochs, spec.updates_per_rollout) == (256, 1, 16)
    assert spec.optim.lr == (1e-6 if dapo else 5e-7)
    # OLMo has 4096 positions in all, so prompt and response share them.
    longest = 3584 if name.startswith("olmo") else 4096
    assert (spec.rollout.max_response_tokens, spec.rollout.temperature, spec.rollout.top_p) == (longest, 1.0, 1.0)
    assert (spec.eval.temperature, spec.eval.top_p) == (1.0, 0.95)
    assert spec.rollout.dynamic_sampling is dapo
    assert (spec.rollout.overlong_buffer, spec.rollout.overlong_penalty) == ((1024, 1.0) if dapo else (0, 1.0))
    assert (spec.loss.objective, spec.loss.aggregation) == ("clip", "token_mean")
    if reward == "bernoulli":
        assert spec.reward.model_dump() == {"kind": "bernoulli", "p": 0.5}
    else:
        assert (spec.reward.correct, spec.reward.wrong) == (1.0, -1.0 if dapo else 0.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", preset_names())
def test_prompt_and_response_fit_the_model(name: str) -> None:
    spec = load_spec(name)
    shape = model_shape(spec.model.path)
    assert shape is not None
    assert spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens <= shape.context


@pytest.mark.parametrize(
    ("name", "benchmarks", "k"),
    [(name, ("gsm8k",), 8) for name in PAPER if name != "qwen7b-dapo"]
    + [("qwen7b-dapo", ("amc23", "math500", "aime24", "aime25"), 32)],
)
def test_benchmarks_are_those_of_the_figures(name: str, benchmarks: tuple[str, ...], k: int) -> None:
    spec = load_spec(name)
    assert (spec.eval.benchmarks, spec.eval.k) == (benchmarks, k)
    assert set(benchmarks) <= set(TASKS)


@pytest.mark.parametrize("name", ["tiny", "tiny-random", "smollm2-arith", "smollm2-gsm8k"])
def test_small_presets_run_on_a_cpu_of_one_core(name: str) -> None:
    spec = load_spec(name)
    assert (spec.engine.device, spec.engine.threads, spec.model.dtype) == ("cpu", 1, "float32")
    assert sum(make_plan(spec).memory.values()) < 8 * 2**30


def test_the_missions_line() -> None:
    spec = load_spec("qwen3b-gsm8k", {"clip.low": 0.15, "clip.high": math.inf})
    assert (spec.responses, spec.updates_per_rollout, spec.clip.low, spec.clip.high) == (4096, 16, 0.15, math.inf)


def test_tiny_random_differs_from_tiny_in_the_reward_alone() -> None:
    a, b = load_spec("tiny").model_dump(), load_spec("tiny-random").model_dump()
    assert {key for key in a if a[key] != b[key]} == {"reward"}
