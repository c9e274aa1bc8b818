"""What --dry-run says, against numbers made by hand."""

import subprocess
import sys
from typing import Any

import pytest

from clipctl.plan import clip_warnings, make_plan, peak_memory, plan_lines, zero_advantage_share
from clipctl.spec import RunSpec, load_spec


def spec(preset: str = "qwen3b-gsm8k", **overrides: Any) -> RunSpec:
    return load_spec(preset, {key.replace("__", "."): value for key, value in overrides.items()})


def test_the_3b_run_by_hand() -> None:
    """3 085 938 688 weights: 2 bytes bfloat16, 4 float32 master, 2+4 gradients, 8 AdamW; 36 layers × 2 heads × 128 × 2."""
    plan = make_plan(spec())
    count = 3_085_938_688
    assert (plan.responses, plan.updates, plan.clippable_updates) == (4096, 16, 15)
    assert plan.max_response_tokens == 4096 * 4096
    assert plan.memory["weights"] == 2 * count
    assert plan.memory["float32 master weights"] == plan.memory["float32 gradients"] == 4 * count
    assert plan.memory["AdamW moments"] == 8 * count
    assert plan.memory["KV cache of the sampler, at most"] == 256 * (1024 + 4096) * 36 * 2 * 2 * 128 * 2
    assert plan.disk_model == 2 * count


def test_sampling_and_training_take_turns_in_memory() -> None:
    held = {"a": 5, "KV cache of the sampler, at most": 7, "activations, estimated": 2, "statistics": 3}
    assert peak_memory(held) == 5 + 7


@pytest.mark.parametrize(
    ("reward", "share"),
    [
        ({"kind": "bernoulli", "p": 0.3}, 0.3**8 + 0.7**8),
        ({"kind": "rademacher"}, 2 / 256),
        ({"kind": "normal"}, 0.0),
        ({"kind": "uniform"}, 0.0),
        ({"kind": "gsm8k"}, None),
    ],
)
def test_expected_share_of_groups_without_advantage(reward: dict[str, Any], share: float | None) -> None:
    found = zero_advantage_share(spec(reward=reward))
    assert found is None if share is None else found == pytest.approx(share, rel=1e-12)


def test_warnings_where_clipping_cannot_have_an_effect() -> None:
    assert clip_warnings(spec()) == []
    (one,) = clip_warnings(spec(optim__responses_per_update=4096))
    assert "one update a rollout" in one
    (reinforce,) = clip_warnings(spec(optim__responses_per_update=4096, loss__objective="reinforce"))
    assert "never clips" in reinforce
    (off,) = clip_warnings(spec(clip__low=1.0, clip__high=float("inf")))
    assert "both off" in off


def test_what_is_printed() -> None:
    text = "\n".join(plan_lines(make_plan(spec(clip__low=0.15, clip__high=float("inf"), loss__aggregation="constant"))))
    for words in ("512 prompts × 8 = 4096 responses", "16 updates per rollout, 256 responses each (32 whole groups)",
                  "15 of them can clip", "ε_low 0.15, clip-high off", "1/(B·4096)"):  # fmt: skip
        assert words in text
    assert "1/(B·T_i)" in "\n".join(plan_lines(make_plan(spec(loss__aggregation="sequence_mean"))))
    assert "0.78% of the groups" in "\n".join(plan_lines(make_plan(spec("tiny-random"))))


def test_an_unknown_model_leaves_memory_out_and_says_so() -> None:
    plan = make_plan(spec(model__path="somebody/something"))
    assert plan.memory == {}
    assert "its shape is not known here" in plan_lines(plan)[0]


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from clipctl.plan import make_plan; from clipctl.spec import load_spec; "
        "make_plan(load_spec('qwen7b-dapo')); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
