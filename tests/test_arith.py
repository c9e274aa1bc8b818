"""Generated arithmetic: right answers (worked out again from the text), distinct, fresh, and a function of the seed."""

import re
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipctl.arith import arith_problems, expression, pretraining_terms


@pytest.mark.parametrize(
    ("style", "first"),
    [
        ("expression", [("10 + 6 + 16", "32"), ("20 + 10 + 15", "45"), ("8 + 14 + 1", "23")]),
        (
            "words",
            [
                ("David has 5 baskets with 9 eggs in each. How many eggs does David have in total?", "45"),
                ("Peter has 14 pencils and Grace has 4 pencils. How many pencils do they have together?", "18"),
                ("Tina puts 3 cards in each of 8 boxes. How many cards does Tina need?", "24"),
            ],
        ),
    ],
)
def test_first_problems_are_pinned(style: str, first: list[tuple[str, str]]) -> None:
    assert arith_problems(style, 3, 0) == first


@given(
    seed=st.integers(0, 2**31),
    fewer=st.integers(1, 60),
    more=st.integers(0, 60),
    style=st.sampled_from(["expression", "words"]),
)
@settings(max_examples=20, deadline=None)
def test_more_problems_begin_with_the_fewer(seed: int, fewer: int, more: int, style: str) -> None:
    problems = arith_problems(style, fewer + more, seed)
    assert problems[:fewer] == arith_problems(style, fewer, seed)
    assert len({question for question, _ in problems}) == fewer + more


def test_seeds_give_different_problems() -> None:
    assert arith_problems("words", 50, 1) != arith_problems("words", 50, 2)
    assert arith_problems("expression", 50, 1) != arith_problems("expression", 50, 2)


def test_expressions_are_all_that_pretraining_has_not_seen() -> None:
    given_out = dict(arith_problems("expression", 10**6, 3))
    seen = {expression(*terms) for terms in pretraining_terms()}
    assert len(given_out) == 5945
    assert len(seen) == 8000 - 5945
    assert not seen & given_out.keys()
    for question, answer in given_out.items():
        a, b, c = (int(term) for term in question.split(" + "))
        assert int(answer) == a + b + c
        assert {a, b, c} <= set(range(1, 21))


def test_every_addition_can_be_learned_in_pretraining() -> None:
    """Each pair of terms, and nearly each of the 780 pairs of a sum and a term, is in pretraining text in some order of
    the terms: the held-out expressions are new only as a combination."""
    numbers = range(1, 21)
    orders = [order for terms in pretraining_terms() for order in permutations(terms)]
    assert {(x, y) for x, y, _ in orders} == {(x, y) for x in numbers for y in numbers}
    assert len({(x + y, z) for x, y, z in orders}) == 753


def test_word_problems_are_solved_by_their_own_words() -> None:
    """The operation is read off the wording, independently of the generator's templates."""
    signs = set()
    for question, answer in arith_problems("words", 2000, 5):
        a, b = (int(number) for number in re.findall(r"\d+", question))
        if re.search(r"gives \d+ of|takes|lost|fewer", question):
            signs.add("-")
            assert int(answer) == a - b > 0
        elif re.search(r"\beach\b|every day", question):
            signs.add("×")
            assert int(answer) == a * b <= 81
        else:
            signs.add("+")
            assert int(answer) == a + b
        assert question.endswith("?")
        assert "{" not in question
    assert signs == {"+", "-", "×"}
