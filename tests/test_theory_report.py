"""`clipctl theory`: its tables, its JSON, its charts, and what it says of wrong input."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipctl.errors import SpecError, StoreError
from clipctl.theory import exact_change, first_order
from clipctl.theory_report import COUNTEREXAMPLES, Options, counterexamples, theory_report

SMALL = Options(trials=12, steps=20)


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    answer: dict[str, object] = json.loads(theory_report(SMALL, "json", None, False))
    return answer


def test_the_json_has_every_trial_and_every_step(report: dict[str, object]) -> None:
    assert report["schema_version"] == 1
    assert report["options"]["trials"] == 12  # type: ignore[index]
    trials = report["trials"]
    assert isinstance(trials, list)
    assert len(trials) == 12 * 2 * 2
    for row in trials:
        assert row["predicted"] == pytest.approx(row["clip_low"] + row["clip_high"], abs=1e-18)
        if row["slope"] is not None:
            assert row["exact"] == pytest.approx(row["predicted"], rel=0.05, abs=1e-7)
    curves = report["entropies"]["random"]["npg"]  # type: ignore[index]
    assert {len(seed) for arm in curves.values() for seed in arm} == {21}
    assert set(curves) == {"both clips", "no clip-high", "no clip-low", "neither"}
    (first,) = {seed[0] for arm in curves.values() for seed in arm[:1]}
    assert first > 0


def test_the_slopes_are_2(report: dict[str, object]) -> None:
    for table in ("theorems", "action_dependent"):
        for row in report[table]:  # type: ignore[attr-defined]
            assert row["slope"] == pytest.approx(2.0, abs=0.05)
            assert row["within 2 ± 0.05"] >= 0.9


def test_each_counterexample_fails_its_inequality_and_turns_the_sign() -> None:
    rows = counterexamples()
    assert sorted(row["inequality"] for row in rows) == ["(7) high", "(7) low", "(8) high", "(8) low"]
    for row in rows:
        assert row["left side"] < 0
        expected = 1 if row["the title says"] == "up" else -1
        assert row["predicted ΔH"] * expected < 0
        assert row["true ΔH"] * expected < 0


def test_a_counterexample_is_one_without_the_report() -> None:
    """(7) low by hand: π = (.7, .3), H = .6109, Q = (.1779, -.1779), X = {first}: E[Q] - Q = .0712 - .1779."""
    old, now, low, high, _ = COUNTEREXAMPLES["a common action fell: X is common"]
    found = first_order(old, now, eps_low=low, eps_high=high, mu=1, nu=0.5, step=1e-3)
    assert float(found.gap_low) == pytest.approx(0.0712 - 0.1779, abs=2e-4)
    assert exact_change(old, now, eps_low=low, eps_high=high, mu=1, nu=0.5, step=1e-3) < 0


def test_fixed_epsilons_are_used() -> None:
    rows = json.loads(theory_report(Options(trials=3, steps=2, eps_low=0.11, eps_high=0.33), "json", None, False))[
        "trials"
    ]
    assert {(row["eps_low"], row["eps_high"]) for row in rows} == {(0.11, 0.33)}


def test_csv_is_the_trials_and_the_table_has_its_headings() -> None:
    rows = list(csv.DictReader(io.StringIO(theory_report(Options(trials=2, steps=2), "csv", None, False))))
    assert len(rows) == 8
    assert {row["algorithm"] for row in rows} == {"pg", "npg"}
    text = theory_report(Options(trials=2, steps=2), "table", None, False)
    for words in ("Theorem 1", "inequality", "a common action fell", "token formula", "against neither"):
        assert words in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_charts_are_written(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"theory{suffix}"
    theory_report(Options(trials=4, steps=16), "csv", file, False)
    content = file.read_bytes()
    start = {".png": b"\x89PNG", ".svg": b"<svg", ".html": b"<!DOCTYPE html>"}[suffix]
    assert content.lstrip().startswith(start)
    if suffix == ".svg":
        for words in (b"no clip-high", b"nats", b"natural policy gradient"):
            assert words in content
    if suffix == ".html":
        assert b'src="http' not in content
        assert b"vega" in content


def test_a_plot_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"must end in .png, .svg, .html"):
        theory_report(SMALL, "table", tmp_path / "a.pdf", False)
    with pytest.raises(StoreError, match="cannot be written"):
        theory_report(Options(trials=1, steps=1), "csv", tmp_path / "missing" / "a.svg", False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trials", "0"], "--trials: 0 is under 1"),
        (["--actions", "1"], "--actions: 1 is under 2"),
        (["--eps-low", "1.5"], "--eps-low: 1.5 is not from 0 to 1"),
        (["--eps-high", "-0.1"], "--eps-high: -0.1 is under 0"),
        (["--eps-high", "nan"], "--eps-high: nan is under 0"),
        (["--format", "xml"], "--format: 'xml' is not one of table, json, csv"),
        (["--plot", "x.gif"], "--plot: 'x.gif' must end in .png, .svg, .html"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipctl", "theory", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line
