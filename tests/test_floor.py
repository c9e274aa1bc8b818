"""The floor of a rollout's time, against numbers made by hand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipctl.models import MODELS, ModelShape

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from floor import Device, Shape, floor

TABLE_1 = Shape(responses=4096, prompt=100, response=300, group=8, side_by_side=1024, updates=16)
H200 = Device(790e12, 4.3e12)


def test_by_hand_with_round_numbers() -> None:
    """V=10, D=4, one layer of 2 heads of 2 and one key-value head, intermediate 8, tied: embedding 40; attention 4×(4+2)×2 = 48,
    MLP 96, norms 12: 156 in the body.

    2 responses of 6 tokens to one prompt of 2. A token: body 312, attention 4·2·2·1·4 = 64, head 80. Scoring: 16 × 376 + 12 × 80.
    """
    model = ModelShape(10, 4, 1, 2, 1, 2, 8, True, 64)
    assert model.parameters == 40 + 156
    found = floor(model, Shape(2, 2, 6, group=2, side_by_side=2, updates=3), Device(1.0, 1e9))
    assert found.score == 16 * 376 + 12 * 80 == 6976
    # 12 × 392 for the products, 2 × 312 for the prompt; a token reads 2 + 3 others at 2 · 1 · 1 · 2 values of 2 bytes.
    assert found.sample == pytest.approx(12 * 392 + 12 * 5 * 8 / 1e9 + 2 * 312, rel=1e-15)
    assert found.update == pytest.approx(3 * 6976 + 3 * 30 * 196 / 1e9, rel=1e-15)
    # With slow memory, 12 / 2 readings of 196 weights of 2 bytes.
    slow = floor(model, Shape(2, 2, 6, group=2, side_by_side=2, updates=3), Device(1e9, 1.0))
    assert slow.sample == pytest.approx(6 * 2 * 196 + 12 * 5 * 8 + 2 * 312 / 1e9, rel=1e-9)
    wide = floor(model, Shape(2, 2, 6, group=2, side_by_side=2, updates=3, width=4, recompute=True), Device(1e9, 1.0))
    assert wide.sample == pytest.approx(6 * 4 * 196 + 12 * 5 * 16 + 2 * 312 / 1e9, rel=1e-9)
    assert wide.update == pytest.approx(3 * 28 * 196 + 4 * 6976 / 1e9, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "sample", "score", "update", "total"),
    [
        ("qwen2.5-1.5b-instruct", 7.0, 6.2, 18.87, 32.1),
        ("qwen2.5-3b-instruct", 12.6, 12.6, 38.14, 63.3),
        ("qwen2.5-7b-instruct", 26.9, 28.9, 87.65, 143.5),
        ("llama-3.2-1b-instruct", 6.3, 4.9, 14.84, 26.1),
        ("llama-3-8b-instruct", 33.6, 30.8, 93.30, 157.7),
    ],
)
def test_the_papers_models_in_the_shape_of_table_1(
    model: str, sample: float, score: float, update: float, total: float
) -> None:
    """An independent calculation, rounded to a tenth of a second."""
    found = floor(MODELS[model].shape, TABLE_1, H200)
    assert (found.sample, found.score, found.update) == pytest.approx((sample, score, update), abs=0.06)
    assert found.total == pytest.approx(total, abs=0.11)
    recomputed = floor(MODELS[model].shape, replace(TABLE_1, recompute=True), H200)
    assert recomputed.update - found.update == pytest.approx(found.score)
