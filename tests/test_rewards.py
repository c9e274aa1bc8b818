r"""Graders and rewards: answer forms one by one, hostile completions, processes that are really killed, keyed draws."""

import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from clipctl import grade, grading_worker
from clipctl.answers import (
    NUMBER,
    OUTCOMES,
    Extracted,
    _canonical,
    compare_cheaply,
    extract_math,
    grade_gsm8k,
    last_box,
    last_number,
    plain_text,
)
from clipctl.errors import DataError, DivergedError, EngineError, SpecError
from clipctl.grading_worker import Workers, parse_golds
from clipctl.rewards import GRADERS, REWARDS, GradingPool, open_scorer
from clipctl.rollout import DrawKey, Problem
from clipctl.spec import Reward

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")

GSM8K_FORMS: list[tuple[str, str | None]] = [
    ("18", "18"),
    ("#### 18", "18"),
    ("####18", "18"),
    ("The answer is 18.", "18"),
    ("**18**", "18"),
    ("__18__", "18"),
    ("`18`", "18"),
    ("\\boxed{18}", "18"),
    ("$\\boxed{-7}$", "-7"),
    ("5 + 13 = 18", "18"),
    ("x=18", "18"),
    ("first 3, then 18", "18"),
    ("3,18", "18"),
    ("1,234", "1234"),
    ("1,234,567.", "1234567"),
    ("1{,}234", "1234"),
    ("12,\\!345", "12345"),
    ("1\\,234", "1234"),
    ("1\u202f234", "1234"),
    ("12,3456", "3456"),
    ("1 234", "234"),
    ("$18.00", "18"),
    ("\\$18.00", "18"),
    ("18€", "18"),
    ("£1,018.50", "1018.5"),
    ("USD 18", "18"),
    ("Rs.18", "18"),
    ("18 dollars", "18"),
    ("18 dollars and 3 cents", "3"),
    ("18.", "18"),
    ("18...", "18"),
    ("...18", "18"),
    ("18.0", "18"),
    ("18.50", "18.5"),
    ("0.25", "0.25"),
    (".25", "0.25"),
    ("007", "7"),
    ("0", "0"),
    ("-0.0", "0"),
    ("0.333333333333333333333333333333333333", "0.333333333333333333333333333333333333"),
    ("-3", "-3"),
    ("\u22123", "-3"),
    ("-$3", "-3"),
    ("$-3", "-3"),
    ("(-3)", "-3"),
    ("= -3", "-3"),
    ("- 3", "3"),
    ("10-3", "3"),
    ("10\u20133", "3"),
    ("so it is\u20143", "3"),
    ("week-3", None),
    ("COVID-19", None),
    ("50%", "50"),
    ("50\\%", "50"),
    ("50 percent", "50"),
    ("3/4", "0.75"),
    ("-3/4", "-0.75"),
    ("2 1/2", "2.5"),
    ("1/3", "1/3"),
    ("36/2", "36/2"),
    ("18/1", "18/1"),
    ("\\frac{3}{4}", "0.75"),
    ("\\dfrac{1}{3}", "1/3"),
    ("7/0", "7/0"),
    ("12/5/2023", "2023"),
    ("5:30", "30"),
    ("1e3", "1000"),
    ("1.5E+3", "1500"),
    ("2e-2", "0.02"),
    ("2 \u00d7 10^3", "2000"),
    ("2 \\times 10^{-3}", "0.002"),
    ("10^2", "10"),
    ("18 cm^2", "18"),
    ("18 cm\u00b2", "18"),
    ("18 m^{2}", "18"),
    ("18 s^{-1}", "18"),
    ("18 with x_3", "18"),
    ("18_{10}", "18"),
    ("\uff11\uff18", "18"),
    ("\uff0d\uff13\uff0e\uff15", "-3.5"),
    ("\uff04\uff11\uff0c\uff12\uff13\uff14", "1234"),
    ("\u7b54\u6848\u662f18\u3002", "18"),
    ("\u0661\u0668", "18"),
    ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "1234.5"),
    ("\U0001d7cf\U0001d7d6", "18"),
    ("1\u200b8", "18"),
    ("2\u00bd", "2.5"),
    ("\u00be cup", "0.75"),
    ("3\u20444", "0.75"),
    ("x = \u20133", "-3"),
    ("x = \u20113", "-3"),
    ("18kg", "18"),
    ("15th", "15"),
    ("H2O", None),
    ("mp3", None),
    ("abc123def", None),
    ("version 1.2.3", None),
    ("18.5.2", None),
    ("at 192.168.10.1", None),
    ("eighteen", None),
    ("no number", None),
    ("", None),
]


def test_the_written_list_is_long_enough() -> None:
    assert len({text for text, _ in GSM8K_FORMS}) == len(GSM8K_FORMS) >= 60


@pytest.mark.parametrize(("text", "number"), GSM8K_FORMS)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number
    if number is not None:
        assert last_number(f"There are 41 and 5.5 of them.\n{text}") == number


def test_gsm8k_outcomes() -> None:
    assert grade("gsm8k", "She makes 9 * 2 = $18.00 a day.", "18") == "correct"
    assert grade("gsm8k", "18 and then 19", "18") == "wrong"
    assert grade("gsm8k", "36/2", "18") == "wrong"
    assert grade("gsm8k", "-18", "18") == "wrong"
    assert grade("gsm8k", "I do not know.", "18") == "no_answer"
    assert grade("gsm8k", "1,234", "so 1234\n#### 1234") == "correct"
    with pytest.raises(DataError, match="answer 'many' has no number"):
        grade("gsm8k", "18", "many")
    with pytest.raises(SpecError, match="grader 'gsm9k' is not one of gsm8k, math"):
        grade("gsm9k", "18", "18")


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3))
def test_a_number_is_the_same_however_it_is_written(number: Any) -> None:
    forms = [f"{number}", f"{number:,}", f"it is {number}.", f"**{number:,}**", f"{number}0", f"\\boxed{{{number}}}"]
    assert len({last_number(form) for form in forms}) == 1
    assert math.isclose(float(last_number(forms[0]) or "nan"), float(number))


@given(st.text(alphabet="0123456789.,-/$%^_{}eE x×*\n\\frac+", max_size=60))
def test_reading_from_the_end_finds_what_reading_it_all_finds(text: str) -> None:
    every = [_canonical(number) for number in NUMBER.finditer(plain_text(text))]
    assert last_number(text) == (every[-1] if every else None)


@settings(max_examples=50)
@given(st.text(max_size=200), st.integers(0, 10**6))
def test_what_stands_before_the_answer_never_matters(text: str, number: int) -> None:
    assert last_number(f"{text}\n#### {number}") == str(number)


@pytest.mark.parametrize(
    "text",
    [
        "1," * 500_000,
        "1." * 500_000,
        "1" * 1_000_000,
        "1,111" * 200_000,
        "-" * 1_000_000,
        "1 1/" * 250_000,
        "9e" * 500_000,
    ],
)
def test_a_megabyte_is_read_at_once(text: str) -> None:
    started = time.perf_counter()
    last_number(text)
    extract_math(text)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{3} no, \\boxed{4}", "4"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{\\text{it is } \\boxed{4} }", "4"),
        ("\\boxed{4} and \\boxed{5", "4"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {4}", "4"),
        ("\\fbox{4}", "4"),
        ("\\boxed 4", "4"),
        ("\\boxed{3} then \\boxed 4.", "4."),
        ("\\boxed{}", ""),
        ("}} \\boxed{4}", "4"),
        ("{ \\boxed{4}", "4"),
        ("\\\\boxed{4}", None),
        ("boxed{4}", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        ("Answer: 3\n\\boxed{4}\nAnswer: 5", Extracted("boxed", "4")),
        ("Answer: 3\nso\nAnswer: $5$\nbecause", Extracted("line", "$5$")),
        ("**Answer:** 5", Extracted("line", "5")),
        ("**Final Answer**:\n\n5 apples\n", Extracted("line", "5 apples")),
        ("ANSWER : \\frac12", Extracted("line", "\\frac12")),
        ("Answer:\n$$\n\\frac{1}{2}\n$$", Extracted("line", "$\\frac{1}{2}$")),
        ("Answer:\n\\[ x + 1 \\]", Extracted("line", "$x + 1$")),
        ("Answer:  ", Extracted("tail", "Answer:")),
        ("Answer\uff1a5", Extracted("line", "5")),
        ("\u7b54\u6848\uff1a5", Extracted("line", "5")),
        ("Answer: 3\n#### x+1 ", Extracted("line", "x+1")),
        ("so\n####\n5", Extracted("line", "5")),
        ("#### Answer: 5", Extracted("line", "5")),
        ("#### Step 2\nso it is 5", Extracted("tail", "#### Step 2\nso it is 5")),
        ("#### 4 ####", Extracted("tail", "#### 4 ####")),
        ("\\boxed{4}\n#### 5", Extracted("boxed", "4")),
        ("so it is 4 ", Extracted("tail", "so it is 4")),
        ("\\boxed{ }", None),
        (" \n ", None),
    ],
)
def test_where_the_answer_is(text: str, extracted: Extracted | None) -> None:
    assert extract_math(text) == extracted


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("4", "4", "correct"),
        ("4", " $4$. ", "correct"),
        ("033", "33", "correct"),
        ("27", "27.0", "correct"),
        ("1000", "1,000", "correct"),
        ("1000", "1{,}000", "correct"),
        ("32348", "\\$32,\\!348", "correct"),
        ("-5", "\u22125", "correct"),
        ("4", "5", "wrong"),
        ("4", "4.0000001", None),
        ("0.5", "0.50000001", None),
        ("\\frac{1}{2}", "\\dfrac{1}{2}", "correct"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", "correct"),
        ("\\frac{1}{2}", "0.5", None),
        ("10", "10\\%", None),
        ("34", "3 4", None),
        ("12345", "12 345", "correct"),
        ("1234567", "1\\,234\\,567", "correct"),
        ("18", "18 dollars", "correct"),
        ("18", "\\text{18 square feet}", "correct"),
        ("18", "19 dollars", "wrong"),
        ("60", "60 km / h", "correct"),
        ("18", "18 million dollars", None),
        ("18", "18 or more", None),
        ("18", "18 dollars and 3 cents", None),
        ("10 meters", "10 meters", "correct"),
        ("4", "\u00a34", "correct"),
        ("-4", "-\\$4", "correct"),
        ("4", "4\u20ac", "correct"),
        ("1011_2", "1011_{2}", "correct"),
        ("1011_2", "1011_3", "wrong"),
        ("2A_{16}", "2B_{16}", "wrong"),
        ("1011_2", "1011", None),
        ("", "", None),
    ],
)
def test_what_needs_no_math_verify(gold: str, answer: str, outcome: str | None) -> None:
    assert compare_cheaply(gold, answer) == outcome


@pytest.fixture(scope="module")
def pool() -> Any:
    with GradingPool(workers=2, timeout=5) as shared:
        yield shared


MATH_FORMS = [
    ("so \\boxed{\\frac{2}{4}}", "\\frac12", "correct"),
    ("\\boxed{0.5}", "\\frac{1}{2}", "correct"),
    ("\\boxed{3} no, \\boxed{4}", "4", "correct"),
    ("\\boxed{4} no, \\boxed{3}", "4", "wrong"),
    ("\\boxed{x+1}", "1+x", "correct"),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", "correct"),
    ("\\boxed{x=4}", "4", "correct"),
    ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", "correct"),
    ("\\boxed{(2, 1)}", "(1,2)", "wrong"),
    ("\\boxed{2,1}", "1,2", "correct"),
    ("\\boxed{18\\text{ cm}}", "18", "correct"),
    ("\\boxed{90^\\circ}", "90", "correct"),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", "correct"),
    ("\\boxed{\\text{Angela}}", "\\text{Evelyn}", "wrong"),
    ("\\boxed{\\$32,348}", "\\$32,\\!348", "correct"),
    ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "correct"),
    ("\\boxed{\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "wrong"),
    ("\\boxed{[1,2)}", "[1, 2)", "correct"),
    ("\\boxed{2\\sqrt{2}}", "\\sqrt 8", "correct"),
    ("\\boxed{3+2i}", "2i + 3", "correct"),
    ("\\boxed{37 \\cup 41}", "41", "wrong"),
    ("\\boxed{37 @ 41}", "41", "wrong"),
    ("\\boxed{37 \\text{ or } 41}", "41", "wrong"),
    ("\\boxed{37, 41}", "41", "wrong"),
    ("\\boxed{\\{1, 2, 3, 4, 5, 6, 7, 8, 9\\}}", "4", "wrong"),
    ("\\boxed{\\pm 4}", "4", "wrong"),
    ("\\boxed{4!!", "5", "wrong"),
    ("\\boxed{1 1/2}", "\\frac32", "correct"),
    ("\\boxed{1 1/2}", "\\frac{11}{2}", "wrong"),
    ("\\boxed{-1 1/2}", "-1.5", "correct"),
    ("\\boxed{1\\frac{1}{2}}", "\\frac32", "correct"),
    ("Answer: 1 1/2 hours", "\\frac32", "correct"),
    ("It took 1 1/2 hours", "1.5", "correct"),
    ("\\boxed{\u00bd}", "\\frac12", "correct"),
    ("\\boxed{x\u00b2}", "x^2", "correct"),
    ("\\boxed{x**2 + 1}", "x^2+1", "correct"),
    ("\\boxed{2\u221a(3)}", "2\\sqrt3", "correct"),
    ("\\boxed{1e3}", "1000", "correct"),
    ("\\boxed{90\u00b0}", "90", "correct"),
    ("\\boxed{18 dollars}", "18", "correct"),
    ("\\boxed{1011_3}", "1011_2", "wrong"),
    ("\\boxed{1011}", "1011_2", "correct"),
    ("\\boxed{(-\\infty, 3]}", "(-\\infty,3)", "wrong"),
    ("\\boxed{x \\in [1,2)}", "[1,2)", "correct"),
    ("\\boxed{q - p}", "p-q", "wrong"),
    ("\\boxed{12,345}", "12345", "correct"),
    ("\\boxed{12.345}", "12345", "wrong"),
    ("```\n\\boxed{5}\n```", "5", "correct"),
    ("`\\boxed{5}` is what I print, then 6.", "5", "correct"),
    ("\\boxed{4", "4", "correct"),
    ("\\boxed{4} \\boxed{}", "4", "no_answer"),
    ("\\boxed{4} trailing words and 17 more", "4", "correct"),
    ("#### x+1", "1+x", "correct"),
    ("#### \\text{Evelyn}", "\\text{Evelyn}", "correct"),
    ("\u7b54\u6848\u662f18", "18", "correct"),
    ("\\boxed{}", "4", "no_answer"),
    ("Answer: \\frac{2}{4}", "\\frac12", "correct"),
    ("Answer: 1/2", "\\frac12", "correct"),
    ("Answer: 42 apples", "42", "correct"),
    ("Answer: 6 - 5i", "6-5i", "correct"),
    ("Answer: 3, 5, 7", "7,5,3", "correct"),
    ("Answer: $34$\nCheck: 17 * 2 = 35", "34", "correct"),
    ("First $3$ and in the end $\\frac{10}{20}$.", "\\frac12", "correct"),
    ("The final answer is 17", "17", "correct"),
    ("It is 17, not 18", "18", "correct"),
    ("I cannot say.", "18", "no_answer"),
    ("", "18", "no_answer"),
    ("\\boxed{" + "1+" * 1500 + "1}", "1501", "too_long"),
]


@pytest.mark.parametrize(("completion", "gold", "outcome"), MATH_FORMS)
def test_math_forms(pool: GradingPool, completion: str, gold: str, outcome: str) -> None:
    assert pool.grade_many("math", [completion], [gold]) == [outcome]


def test_a_batch_keeps_its_order_and_grades_the_same_question_once(pool: GradingPool) -> None:
    completions, golds, outcomes = zip(*MATH_FORMS, strict=True)
    order = list(range(len(MATH_FORMS))) * 3
    random.Random(1).shuffle(order)
    graded = pool.grade_many("math", [completions[at] for at in order], [golds[at] for at in order])
    assert graded == [outcomes[at] for at in order]
    assert pool.grade_many("math", [], []) == []
    assert pool.grade_many("gsm8k", ["18", "19", "?"], ["18", "18", "18"]) == ["correct", "wrong", "no_answer"]


def test_a_gold_that_is_no_formula_is_never_graded_wrong(pool: GradingPool) -> None:
    with pytest.raises(DataError, match=r"answer '\?\?\?' is no formula"):
        pool.grade_many("math", ["\\boxed{x^2}"], ["???"])


HOSTILE = [
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{10^{10^{10}}}",
    "\\boxed{2^{2^{100}}}",
    "so it is 9**9**9**9",
    "$99999^{99999999}$",
    "\\boxed{10000000!}",
    "\\boxed{((((9!)!)!)!)}",
    "\\boxed{\\binom{10^9}{5\\cdot 10^8}}",
    "\\boxed{\\sum_{k=1}^{10^{12}} 1/k}",
    "\\boxed{\\prod_{k=1}^{10^7} k}",
    "\\boxed{\\Gamma(10^9)}",
    "\\boxed{3^{10^8}+1}",
    "\\boxed{" + "(" * 900 + "4" + ")" * 900 + "}",
    "\\boxed{" + "(" * 20_000 + "4" + ")" * 20_000 + "}",
    "\\boxed{" + "\\sqrt{" * 250 + "4" + "}" * 250 + "}",
    "\\boxed{" + "7" * 1_990 + "}",
    "\\boxed{" + "7" * 60_000 + "}",
    "\\boxed{0." + "0" * 1_900 + "1}",
    "\\boxed{1e999999999}",
    "\\boxed{" + "+".join(f"\\sin({k}x)^{k}" for k in range(1, 40)) + "}",
    "$" + "=".join(["1+1"] * 400) + "$",
    "\\boxed{1/0}",
    "\\boxed{\\infty-\\infty}",
    "$" * 100_000,
    "word " * 200_000,
    "1+" * 500_000,
    "\\boxed{" * 20_000,
    "}" * 100_000,
    "\\boxed{" * 9_000 + "}" * 8_999,
    "\x00\x00 \\boxed{\x00}",
    "\ud800 \\boxed{\ud800}",
    "\\boxed{\u202e5}",
    "\x1b]52;c;AAAA\x07 \\boxed{\x1b[2J}",
    "\\boxed{__import__('os').system('exit')}",
    "\\boxed{" + "\\frac{1}{" * 200 + "4" + "}" * 200 + "}",
    "\\boxed{" + "x" * 1_900 + "}",
    "\\boxed{\\int_0^1 x^{x^{x^x}} dx}",
    "\\boxed{\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{1000000}}",
    "\\boxed{\\left\\left\\left{{{}}}",
    "\\boxed{\\unknown{\\command}[}",
    "\\boxed{100000!}",
    "\\boxed{(100!)!}",
    "$7^{10^8}$",
    "\\boxed{10^{-10^{10}}}",
    "\\boxed{\\sqrt{3^{10^8}}}",
    "\\boxed{\\lfloor 3^{10^8}/7 \\rfloor}",
    "\\boxed{x = 3^{10^8}}",
    "\\boxed{\\{3^{10^8}, 4\\}}",
    "\\boxed{x > 3^{10^8}}",
    "\\boxed{\\log_{10} 10^{10^{10^2}}}",
    "\\boxed{\\sin(10^{1000})}",
    "\\boxed{\\tan\\tan\\tan 10^{50}}",
    "\\boxed{(\\frac13)^{10^8}}",
    "\\boxed{\\lim_{x\\to 0} \\frac{\\sin x^x}{x^{x^x}}}",
    "\\boxed{\\sum_{k=1}^{10^6} \\sin k^2}",
    "\\boxed{\\begin{pmatrix}" + "\\\\".join(["&".join("1" * 20)] * 20) + "\\end{pmatrix}}",
    "\\boxed{" + "[" * 900 + "]" * 900 + "}",
    "\\boxed{" + "|" * 1_500 + "}",
    "\\boxed{" + "-" * 1_900 + "5}",
    "\\boxed{" + "5^" * 600 + "5}",
    "\\boxed{" + "5!" + "!" * 1_500 + "}",
    "Answer: " * 9_000,
    "####" * 16_000,
    "Answer: " + "(" * 1_900,
    "\\(" * 30_000,
    "\\[" * 30_000 + "5",
    "\\frac{" * 10_000 + "5",
    "$" + "1 " * 900 + "$",
    "1 " * 30_000,
    "1/" * 30_000 + "5",
    "5 or 6, " * 8_000,
    "\\boxed{\r\n\t\x0b\x0c\x85\u2028}",
    "\\boxed{\x00" + "5\x00" * 500 + "}",
    "\\boxed{\U0001f600" * 900 + "}" * 900,
    "\\boxed{eval(compile('5','','eval'))}",
    "\\input{/etc/passwd} \\boxed{\\write18{id}}",
    "[/INST] <|endoftext|> \\boxed{[bold]5[/]}",
]


@pytest.mark.slow
def test_hostile_completions_cost_their_own_second_and_nothing_else() -> None:
    """None is correct, honest ones among them are, and the whole takes about one limit for each that hangs."""
    assert len(HOSTILE) >= 40
    honest = [f"\\boxed{{\\frac{{{2 * k}}}{{{4 * k + 2}}}}}" for k in range(1, len(HOSTILE) + 1)]
    golds = [f"\\frac{{{k}}}{{{2 * k + 1}}}" for k in range(1, len(HOSTILE) + 1)]
    with GradingPool(workers=2, timeout=1) as pool:
        mixed = [text for pair in zip(HOSTILE, honest, strict=True) for text in pair]
        outcomes = pool.grade_many("math", mixed, [gold for at in golds for gold in ("4", at)])
        again = pool.grade_many("math", honest, golds)
    assert set(outcomes[1::2]) == {"correct"} == set(again)
    bad = outcomes[0::2]
    assert "correct" not in bad
    assert set(bad) <= set(OUTCOMES)
    print(*zip(bad, [text[:50] for text in HOSTILE], strict=True), sep="\n")
    assert bad[:12] == ["timeout"] * 12
    assert bad[13] == bad[16] == "too_long"
    assert bad[15] == "wrong"


@pytest.mark.slow
def test_eight_that_hang_among_512_cost_eight_limits_over_the_workers() -> None:
    """The bound of the issue: 8 × 1 s ÷ 2 workers + 2 s more than without them. No worker is lost, none stays a zombie."""
    numbers = range(1, 505)
    honest = [f"\\boxed{{\\frac{{{2 * k}}}{{{2 * k + 2}}}}}" for k in numbers]
    golds = [f"\\frac{{{k}}}{{{k + 1}}}" for k in numbers]
    hanging = HOSTILE[:8]
    places = [64 * at + 7 for at in range(8)]
    mixed, its_golds = [*honest], [*golds]
    for place, text in zip(places, hanging, strict=True):
        mixed.insert(place, text)
        its_golds.insert(place, "4")
    seconds = []
    for completions, answers in ((honest, golds), (mixed, its_golds)):
        with GradingPool(workers=2, timeout=1) as pool:
            assert pool._workers._server is not None
            server = psutil.Process(pool._workers._server.pid)
            started = time.perf_counter()
            outcomes = pool.grade_many("math", completions, answers)
            seconds.append(time.perf_counter() - started)
            assert len(server.children()) == 2
            assert {child.status() for child in server.children()}.isdisjoint({psutil.STATUS_ZOMBIE})
    assert [outcomes[place] for place in places] == ["timeout"] * 8
    assert outcomes.count("correct") == 504
    assert seconds[1] - seconds[0] <= 8 * 1 / 2 + 2


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_gradings() -> None:
    """Each of another gold; workers are replaced on the way. Resident bytes after every thousand."""
    sizes: list[tuple[int, int]] = []
    with GradingPool(workers=2, timeout=20) as pool:
        assert pool._workers._server is not None
        server = psutil.Process(pool._workers._server.pid)
        for first in range(1, 10_001, 1000):
            numbers = range(first, first + 1000)
            outcomes = pool.grade_many(
                "math",
                [f"\\boxed{{\\frac{{{2 * k}}}{{{2 * k + 2}}}}}" for k in numbers],
                [f"\\frac{{{k}}}{{{k + 1}}}" for k in numbers],
            )
            assert outcomes == ["correct"] * 1000
            sizes.append((server.memory_info().rss, max(child.memory_info().rss for child in server.children())))
    assert sizes[-1][0] - sizes[0][0] < 8e6
    assert max(worker for _, worker in sizes) - sizes[0][1] < 24e6


def test_a_budget_ends_the_whole_call(pool: GradingPool) -> None:
    started = time.perf_counter()
    towers = [f"\\boxed{{9^{{9^{{9^{k}}}}}}}" for k in range(9, 30)]
    outcomes = pool.grade_many("math", [*towers, "\\boxed{5}"], ["4"] * 21 + ["5"], budget_seconds=0.5)
    assert outcomes == ["timeout"] * 21 + ["correct"]
    assert time.perf_counter() - started < 4
    assert pool.grade_many("math", ["\\boxed{\\frac{7}{14}}"], ["0.5"]) == ["correct"]


def test_golds_are_parsed_once_in_the_life_of_a_process() -> None:
    golds = ["x^{17}+2", "\\frac{19}{23}", "x^{17}+2"]
    with Workers(1, 5) as workers:
        parsed = parse_golds(workers, golds)
        assert set(parsed) == set(golds)
        assert parse_golds(workers, ["???"]) == {"???": "bad_gold"}
    with Workers(1, 5, start=False) as idle:
        assert parse_golds(idle, golds) == parsed
        assert idle._server is None


def test_the_budget_is_that_of_a_rollout_over_all_its_groups() -> None:
    """Two calls of one rollout share it, the next rollout has its own."""
    reward = reward_of("math", timeout=1, workers=1, budget=1)
    problems = [Problem("t", "q", "4")]

    def outcome(rollout: int, text: str) -> str | None:
        return scorer.score(problems, [DrawKey(0, rollout, 0)], [[text]])[1][0][0]

    with open_scorer(reward, None, 0) as scorer:
        assert outcome(0, "\\boxed{\\frac{40}{10}}") == "correct"
        assert outcome(0, "\\boxed{9^{9^{9^9}}}") == "timeout"
        assert outcome(0, "\\boxed{\\frac{44}{11}}") == "timeout"
        assert outcome(0, "\\boxed{4}") == "correct"
        assert outcome(1, "\\boxed{\\frac{44}{11}}") == "correct"
    with pytest.raises(ValueError, match="budget = 3 must not be under timeout = 4"):
        reward_of("math", timeout=4, budget=3)
    for timeout in (0.5, 2.0, True, 0):
        with pytest.raises(ValueError, match=r"math\.timeout"):
            reward_of("math", timeout=timeout)


def processes_below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_workers_are_gone_after_close() -> None:
    before = set(processes_below(os.getpid()))
    with GradingPool(workers=2, timeout=1) as pool:
        started = set(processes_below(os.getpid())) - before
        assert len(started) == 3
        assert pool.grade_many("math", ["\\boxed{9^{9^{9^9}}}"], ["4"]) == ["timeout"]
        started |= set(processes_below(os.getpid())) - before
        assert len(started) == 4
    # One that ended and waits for init to take note of it is gone; none may be left below this process, zombies included.
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert set(processes_below(os.getpid())) <= before


@pytest.mark.slow
def test_a_killed_worker_costs_one_sample_and_a_killed_server_none() -> None:
    before = set(processes_below(os.getpid()))
    with GradingPool(workers=1, timeout=20) as pool:
        server, worker = sorted(set(processes_below(os.getpid())) - before, key=lambda process: process.pid)
        outcomes: list[str] = []
        completions = ["\\boxed{9^{9^{9^9}}}", "\\boxed{\\frac{2}{4}}"]
        thread = threading.Thread(
            target=lambda: outcomes.extend(pool.grade_many("math", completions, ["4", "\\frac12"]))
        )
        thread.start()
        time.sleep(0.3)
        worker.kill()
        thread.join(timeout=15)
        assert outcomes == ["crash", "correct"]
        server.kill()
        server.wait(10)
        assert pool.grade_many("math", ["\\boxed{\\frac{3}{9}}"], ["\\frac13"]) == ["correct"]


PARENT = """
import sys, threading
from clipctl.rewards import GradingPool
pool = GradingPool(workers=2, timeout=600)
hang = lambda: pool.grade_many("math", ["\\\\boxed{9^{9^{9^9}}}", "\\\\boxed{8^{9^{9^9}}}"], ["4", "4"])
threading.Thread(target=hang, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_process(number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    started = processes_below(parent.pid)
    assert len(started) == 3
    assert any(process.cpu_times().user > 0.2 for process in started)
    parent.send_signal(number)
    parent.communicate(timeout=10)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stdin", "file", "module"])
def test_scripts_need_no_guard(tmp_path: Path, how: str) -> None:
    """Interactive scripts and scripts that grade at their top level, from a thread, work as they stand."""
    script = (
        "import threading\n"
        "from clipctl import grade\n"
        "def run(): print(grade('math', r'\\boxed{\\frac{2}{4}}', '0.5'))\n"
        "thread = threading.Thread(target=run); thread.start(); thread.join()\n"
    )
    (tmp_path / "own_script.py").write_text(script)
    arguments = {"stdin": ["-"], "file": ["own_script.py"], "module": ["-m", "own_script"]}[how]
    done = subprocess.run(
        [sys.executable, *arguments], input=script if how == "stdin" else "", cwd=tmp_path, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "correct\n", "")


def test_after_a_fork_the_child_grades_with_processes_of_its_own(pool: GradingPool) -> None:
    """A data loader or launcher may fork a process that has a pool; the two must not share a pipe."""
    pid = os.fork()
    if pid == 0:
        outcome = pool.grade_many("math", ["\\boxed{\\frac{5}{10}}"], ["0.5"])
        pool.close()
        os._exit(0 if outcome == ["correct"] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert pool.grade_many("math", ["\\boxed{\\frac{6}{12}}"], ["0.5"]) == ["correct"]


def test_grading_in_a_thread_while_the_main_thread_works(pool: GradingPool) -> None:
    """From several threads at once too: each gets its own answers."""
    outcomes: dict[int, list[str]] = {}

    def grade_some(number: int) -> None:
        completions = [f"\\boxed{{\\frac{{{number}}}{{{k}}}}}" for k in range(1, 12)]
        outcomes[number] = [*pool.grade_many("math", completions, [f"\\frac{{{2 * number}}}{{{2 * number}}}"] * 11)]

    threads = [threading.Thread(target=grade_some, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    worked = 0
    while any(thread.is_alive() for thread in threads):
        worked += sum(range(1000))
    assert worked
    assert outcomes == {n: ["correct" if k == n else "wrong" for k in range(1, 12)] for n in range(1, 7)}


def test_close_ends_what_other_threads_wait_for() -> None:
    """One grading is under way and one waits for its turn; neither may start the processes again."""
    before = set(processes_below(os.getpid()))
    errors: list[BaseException] = []
    pool = GradingPool(workers=2, timeout=600)

    def hang() -> None:
        try:
            pool.grade_many("math", ["\\boxed{9^{9^{9^9}}}"], ["4"])
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=hang) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    pool.close()
    for thread in threads:
        thread.join(timeout=10)
    assert [str(error) for error in errors] == ["the grading processes were ended while they were in use"] * 2
    assert set(processes_below(os.getpid())) <= before
    with pytest.raises(EngineError, match="were ended"):
        pool.grade_many("math", ["\\boxed{x^5}"], ["x^6"])


INTERRUPTED = """
import sys, threading, time
from clipctl.errors import EngineError
from clipctl.rewards import GradingPool

def hang():
    try:
        pool.grade_many("math", ["\\\\boxed{9^{9^{9^9}}}", "\\\\boxed{8^{9^{9^9}}}"], ["4", "4"])
    except EngineError:
        print("ended", flush=True)

try:
    with GradingPool(workers=2, timeout=600) as pool:
        thread = threading.Thread(target=hang)
        thread.start()
        print("ready", flush=True)
        time.sleep(600)
except KeyboardInterrupt:
    thread.join(10)
    sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_with_gradings_under_way_ends_cleanly() -> None:
    """The main thread samples, another waits for formulas that hang; SIGINT goes to the whole foreground group."""
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    started = processes_below(parent.pid)
    assert len(started) == 3
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=10) == ("ended\n", "")
    assert parent.returncode == 130
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_fork_in_the_middle_of_a_grading_can_grade() -> None:
    """The thread that holds the lock does not exist in the child."""
    with GradingPool(workers=1, timeout=2) as pool:
        thread = threading.Thread(target=pool.grade_many, args=("math", ["\\boxed{9^{9^{9^9}}}"], ["4"]))
        thread.start()
        time.sleep(0.3)
        pid = os.fork()
        if pid == 0:
            outcome = pool.grade_many("math", ["\\boxed{\\frac{5}{10}}"], ["0.5"])
            pool.close()
            os._exit(0 if outcome == ["correct"] else 1)
        assert os.waitpid(pid, 0)[1] == 0
        thread.join()
        assert pool.grade_many("math", ["\\boxed{\\frac{6}{12}}"], ["0.5"]) == ["correct"]


def test_a_stopped_server_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading_worker, "LOST_SECONDS", 1)
    with GradingPool(workers=1, timeout=1) as pool:
        server = pool._workers._server
        assert server is not None
        server.send_signal(signal.SIGSTOP)
        assert pool.grade_many("math", ["\\boxed{\\frac{7}{14}}"], ["0.5"]) == ["correct"]
        assert server.returncode is not None


def test_workers_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_TOKEN", "hush")
    before = set(processes_below(os.getpid()))
    with Workers(1, 1):
        for process in set(processes_below(os.getpid())) - before:
            assert b"hush" not in Path(f"/proc/{process.pid}/environ").read_bytes()


# --- golds against themselves ---------------------------------------------------------------------------------------

WRAPPINGS = [
    "The answer is \\boxed{%s}.",
    "#### %s",
    "So\n\nAnswer: %s",
    "Answer: $%s$",
    "Therefore the result is $%s$.",
]


def golds(task: str) -> list[str]:
    rows = [json.loads(line) for line in (DATA / task / "test.jsonl").read_text().strip().split("\n")]
    return [str(row["answer"]).rpartition("####")[2].strip().removesuffix(".0") for row in rows]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_math_golds_against_themselves(pool: GradingPool, wrapping: str) -> None:
    """All of math500 (500), amc23 (40), aime24 (30) and aime25 (30): no exceptions."""
    answers = [gold for task in ("math500", "amc23", "aime24", "aime25") for gold in golds(task)]
    assert len(answers) == 600
    outcomes = pool.grade_many("math", [wrapping.replace("%s", gold) for gold in answers], answers)
    assert [(gold, outcome) for gold, outcome in zip(answers, outcomes, strict=True) if outcome != "correct"] == []


@needs_data
@pytest.mark.slow
def test_math_verify_itself_finds_the_golds_equal(pool: GradingPool) -> None:
    """Without the cheap comparison of texts, which makes the test above easy."""
    answers = golds("math500")
    with Workers(2, 5) as workers:
        for form, wrapping in (("boxed", "%s"), ("line", "%s"), ("tail", "so $%s$.")):
            parsed = parse_golds(workers, answers)
            requests = [("grade", parsed[gold], form, wrapping.replace("%s", gold)) for gold in answers]
            outcomes = workers.run(requests)
            assert outcomes == ["correct"] * 500


@needs_data
@pytest.mark.slow
def test_shuffled_math_golds_are_wrong_except_where_equal(pool: GradingPool) -> None:
    answers = golds("math500")
    order = list(range(len(answers)))
    random.Random(7).shuffle(order)
    outcomes = pool.grade_many("math", [f"\\boxed{{{answers[at]}}}" for at in order], answers)
    for at, gold, outcome in zip(order, answers, outcomes, strict=True):
        assert outcome == ("correct" if answers[at] == gold else "wrong"), (answers[at], gold)


@needs_data
def test_gsm8k_golds_against_themselves_and_shuffled() -> None:
    for task, count in (("gsm8k", 1319), ("svamp", 1000)):
        answers = golds(task)
        assert len(answers) == count
        for wrapping in ("#### %s", "The answer is \\boxed{%s}.", "Answer: %s", "so she has $%s left."):
            assert {grade_gsm8k(wrapping.replace("%s", gold), gold) for gold in answers} == {"correct"}
        shuffled = random.Random(7).sample(answers, len(answers))
        for other, gold in zip(shuffled, answers, strict=True):
            same = float(other.replace(",", "")) == float(gold.replace(",", ""))
            assert grade_gsm8k(f"#### {other}", gold) == ("correct" if same else "wrong")


# --- rewards --------------------------------------------------------------------------------------------------------

PROBLEMS = [Problem("a", "qa", "18"), Problem("b", "qb", "7"), Problem("c", "qc", "0.5")]
KEYS = [DrawKey(3, 5, position) for position in (40, 41, 42)]
TEXTS = [["18", "19"], ["none", "7.0"], ["1/2", "so 2"]]
OUTCOMES_PG = [["correct", "wrong"], ["no_answer", "correct"], ["correct", "wrong"]]


def reward_of(kind: str, **fields: Any) -> Any:
    return TypeAdapter(Reward).validate_python({"kind": kind, **fields})


def score(kind: str, grader: str | None = "gsm8k", seed: int = 3, keys: Any = KEYS, **fields: Any) -> Any:
    with open_scorer(reward_of(kind, **fields), grader, seed) as scorer:
        return scorer.score(PROBLEMS[: len(keys)], keys, TEXTS[: len(keys)])


def test_every_kind_of_the_spec_has_a_reward_and_every_grader_a_reward_kind() -> None:
    kinds = {member.model_fields["kind"].annotation for member in get_args(get_args(Reward)[0])}
    assert set(REWARDS) == {get_args(kind)[0] for kind in kinds}
    assert set(GRADERS) == {"gsm8k", "math"} < set(REWARDS)


def test_graded_rewards() -> None:
    rewards, outcomes = score("gsm8k", grader=None)
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert outcomes == OUTCOMES_PG
    rewards, _ = score("gsm8k", grader="math", correct=2.5, wrong=-1.0)
    assert rewards.tolist() == [[2.5, -1], [-1, 2.5], [2.5, -1]]
    rewards, outcomes = score("math", grader=None, timeout=2, workers=1)
    assert outcomes == [["correct", "wrong"], ["no_answer", "correct"], ["correct", "wrong"]]
    assert rewards.tolist() == [[1, 0], [0, 1], [1, 0]]


RANDOM: dict[str, Any] = {"bernoulli": {"p": 0.3}, "normal": {}, "uniform": {}, "rademacher": {}}
UNIFORM = [
    [0.14789770636281296, 0.5211869823787043],
    [0.5525851086117111, 0.45706810529379105],
    [0.43129452818618996, 0.5531987466449351],
]
"""Philox keyed by blake2b of repr(("reward", 3, 5, 40, 0)) and so on, drawn with numpy alone."""
PINNED: dict[str, list[list[float]]] = {
    "uniform": UNIFORM,
    "bernoulli": [[1, 0], [0, 0], [0, 0]],
    "rademacher": [[1, -1], [-1, 1], [1, -1]],
    "normal": [
        [0.2578791488574052, 0.5465521184523726],
        [-1.1077016923711507, 0.68976316498279],
        [-0.4766104096816349, -0.9834908685479974],
    ],
}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_rewards_are_pinned_and_still_graded(kind: str) -> None:
    """The numbers are part of what makes runs repeatable."""
    rewards, outcomes = score(kind, **RANDOM[kind])
    assert rewards.tolist() == PINNED[kind]
    assert outcomes == OUTCOMES_PG
    _, outcomes = score(kind, grader=None, **RANDOM[kind])
    assert outcomes == [[None, None]] * 3


@pytest.mark.parametrize("kind", RANDOM)
def test_random_rewards_depend_on_their_key_alone(kind: str) -> None:
    """Not on the order of prompts, on the texts, or on what else is in the batch; but on seed, rollout and position."""
    rewards, _ = score(kind, **RANDOM[kind])
    with open_scorer(reward_of(kind, **RANDOM[kind]), None, 3) as scorer:
        backwards, _ = scorer.score(PROBLEMS[::-1], KEYS[::-1], [["x", "y"]] * 3)
        alone, _ = scorer.score(PROBLEMS[:1], KEYS[1:2], [["x", "y", "z"]])
        keys = [DrawKey(3, rollout, position) for rollout in range(8) for position in range(8)]
        many = scorer.score([PROBLEMS[0]] * 64, keys, [["x"] * 8] * 64)[0]
    assert np.array_equal(backwards[::-1], rewards)
    assert np.array_equal(alone[0, :2], rewards[1])
    assert np.unique(many, axis=0).shape[0] > 20
    assert score(kind, seed=4, keys=KEYS, **RANDOM[kind])[0].tolist() != rewards.tolist() or kind in (
        "bernoulli",
        "rademacher",
    )


@pytest.mark.parametrize(
    ("kind", "fields", "mean", "variance"),
    [
        ("bernoulli", {"p": 0.3}, 0.3, 0.21),
        ("normal", {}, 0.0, 1.0),
        ("uniform", {}, 0.5, 1 / 12),
        ("rademacher", {}, 0.0, 1.0),
    ],
)
def test_moments_and_speed(kind: str, fields: dict[str, Any], mean: float, variance: float) -> None:
    keys = [DrawKey(0, 1, position) for position in range(512)]
    with open_scorer(reward_of(kind, **fields), None, 0) as scorer:
        started = time.perf_counter()
        rewards, _ = scorer.score([PROBLEMS[0]] * 512, keys, [[""] * 8] * 512)
        seconds = time.perf_counter() - started
    assert rewards.shape == (512, 8)
    assert abs(rewards.mean() - mean) < 5 * math.sqrt(variance / 4096)
    assert abs(rewards.var() - variance) < 0.12 * max(variance, 0.1)
    within = np.corrcoef(rewards[:, 0], rewards[:, 1])[0, 1]
    assert abs(within) < 5 / math.sqrt(512)
    assert seconds < 2


def test_more_probability_only_adds_ones() -> None:
    low, high = score("bernoulli", p=0.3)[0], score("bernoulli", p=0.7)[0]
    assert (high >= low).all()
    assert score("bernoulli", p=0.0)[0].sum() == 0
    assert score("bernoulli", p=1.0)[0].sum() == 6


def length(completion: str, problem: Problem) -> float:
    """A reward function of one's own."""
    return len(completion) + (10 if problem.id == "b" else 0)


def text(completion: str, problem: Problem) -> Any:
    return "much"


def infinite(completion: str, problem: Problem) -> float:
    return math.inf if problem.id == "b" else 1


def broken(completion: str, problem: Problem) -> float:
    raise KeyError("what\nis this")


def test_a_function_of_ones_own() -> None:
    rewards, outcomes = score("function", function=f"{__name__}:length")
    assert rewards.tolist() == [[2, 2], [14, 13], [3, 4]]
    assert outcomes == OUTCOMES_PG
    assert inspect.signature(length).return_annotation is float


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("nowhere.at.all:f", SpecError, r"'nowhere\.at\.all' cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:missing", SpecError, "has no function 'missing'"),
        (f"{__name__}:PROBLEMS", SpecError, "has something else as function 'PROBLEMS'"),
        (
            f"{__name__}:text",
            DataError,
            r"reward\.function: .*:text returned 'much' for problem a; it must return a number",
        ),
        (f"{__name__}:broken", DataError, r"reward\.function: .*:broken failed on problem a: KeyError: 'what"),
        (f"{__name__}:infinite", DivergedError, r"reward\.function: .*:infinite returned inf for problem b"),
    ],
)
def test_a_function_that_fails(function: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        score("function", function=function)
    assert "\n" not in str(raised.value)


def test_a_function_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("def two(completion, problem): return 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert score("function", function="rewards_of_mine:two")[0].tolist() == [[2, 2]] * 3


@settings(max_examples=30)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.randoms())
def test_the_order_of_a_batch_never_matters(numbers: list[int], rng: random.Random) -> None:
    order = list(range(len(numbers)))
    rng.shuffle(order)
    with GradingPool(start=False) as pool:
        straight = pool.grade_many("math", [f"\\boxed{{{n}}}" for n in numbers], ["42"] * len(numbers))
        shuffled = pool.grade_many("math", [f"\\boxed{{{numbers[at]}}}" for at in order], ["42"] * len(numbers))
    assert shuffled == [straight[at] for at in order]
    assert straight == ["correct" if n == 42 else "wrong" for n in numbers]
