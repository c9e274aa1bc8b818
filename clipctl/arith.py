"""Arithmetic problems, generated: sums of three numbers for the embedded model, one-step word problems for real ones.

Which problems come out depends on (style, problems, seed) alone, and no problem comes twice. More problems of one seed
contain the fewer: the first 100 of 4096 are the 100 of 100.
"""

import random
from collections.abc import Callable
from hashlib import blake2b
from itertools import product

LARGEST_TERM = 20
"""Terms of an expression are 1 … LARGEST_TERM."""
PRETRAINING_SHARE = 4
"""One expression in so many is kept for pretraining the embedded model; the others it has never seen."""

# fmt: off
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack", "Kate", "Liam", "Maya", "Noah",
    "Olivia", "Peter", "Rosa", "Sam", "Tina", "Victor",
)
THINGS = (
    "apples", "marbles", "stickers", "pencils", "books", "coins", "cookies", "stamps", "shells", "cards", "balloons",
    "flowers", "eggs", "candles", "buttons", "oranges", "toys", "stones", "photos", "tickets",
)
# fmt: on
CONTAINERS = ("boxes", "bags", "baskets", "drawers", "jars", "trays")

ADDITIONS = (
    "{name} has {a} {things}. {friend} gives {name} {b} more {things}. How many {things} does {name} have now?",
    "{name} has {a} {things} and {friend} has {b} {things}. How many {things} do they have together?",
    "There are {a} {things} on the table. {name} puts {b} more {things} on the table. "
    "How many {things} are on the table now?",
    "{name} found {a} {things} in the morning and {b} {things} in the afternoon. "
    "How many {things} did {name} find in total?",
)
SUBTRACTIONS = (
    "{name} has {a} {things} and gives {b} of them to {friend}. How many {things} does {name} have left?",
    "There are {a} {things} in a box. {name} takes {b} {things} out of the box. How many {things} are left in the box?",
    "{name} had {a} {things} and lost {b} of them. How many {things} does {name} have now?",
    "{name} has {a} {things}. {friend} has {b} fewer {things} than {name}. How many {things} does {friend} have?",
)
MULTIPLICATIONS = (
    "{name} has {a} {containers} with {b} {things} in each. How many {things} does {name} have in total?",
    "{name} buys {b} {things} every day for {a} days. How many {things} does {name} buy in total?",
    "{a} children have {b} {things} each. How many {things} do they have together?",
    "{name} puts {b} {things} in each of {a} {containers}. How many {things} does {name} need?",
)


def arith_problems(style: str, problems: int, seed: int) -> list[tuple[str, str]]:
    """Distinct (question, answer) pairs of a style, at most `problems` of them.

    style: `expression`, sums of three numbers from 1 to 20 such as "7 + 12 + 5": 8000 exist, 5945 of them are not in
    the embedded model's pretraining data, and only those are given, so `problems` above 5945 gives 5945.
    `words`: additions, subtractions and multiplications of small numbers told in one or two sentences: over a million.
    Answers are non-negative whole numbers in decimal digits.
    """
    assert problems >= 1
    return STYLES[style](problems, seed)


def expression(a: int, b: int, c: int) -> str:
    """The question text of a sum of three numbers."""
    return f"{a} + {b} + {c}"


def pretraining_terms() -> list[tuple[int, int, int]]:
    """The expressions that the embedded model is pretrained on, about one in four of all; never given as problems."""
    return [terms for terms in _all_terms() if _in_pretraining(terms)]


def _expressions(problems: int, seed: int) -> list[tuple[str, str]]:
    fresh = [terms for terms in _all_terms() if not _in_pretraining(terms)]
    # Sorting by a hash is a shuffle that no version of a random generator can change.
    drawn = sorted(fresh, key=lambda terms: _digest(seed, expression(*terms)))[:problems]
    return [(expression(*terms), str(sum(terms))) for terms in drawn]


def _words(problems: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(f"words {seed}")
    drawn: dict[str, str] = {}
    while len(drawn) < problems:
        question, answer = _word_problem(rng)
        drawn.setdefault(question, str(answer))
    return list(drawn.items())


def _word_problem(rng: random.Random) -> tuple[str, int]:
    """One word problem: + with terms 2 … 20, - from 5 … 20 with a positive result, × with factors 2 … 9."""
    name, friend = rng.sample(NAMES, 2)
    kind = rng.randrange(3)
    if kind == 0:
        templates, a, b = ADDITIONS, rng.randint(2, 20), rng.randint(2, 20)
        answer = a + b
    elif kind == 1:
        templates, a = SUBTRACTIONS, rng.randint(5, 20)
        b = rng.randint(2, a - 1)
        answer = a - b
    else:
        templates, a, b = MULTIPLICATIONS, rng.randint(2, 9), rng.randint(2, 9)
        answer = a * b
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS), "containers": rng.choice(CONTAINERS)}
    return rng.choice(templates).format(a=a, b=b, **words), answer


def _all_terms() -> list[tuple[int, int, int]]:
    numbers = range(1, LARGEST_TERM + 1)
    return list(product(numbers, numbers, numbers))


def _in_pretraining(terms: tuple[int, int, int]) -> bool:
    return _digest("pretraining", expression(*terms))[0] % PRETRAINING_SHARE == 0


def _digest(*key: int | str) -> bytes:
    return blake2b(repr(key).encode(), digest_size=8).digest()


STYLES: dict[str, Callable[[int, int], list[tuple[str, str]]]] = {"expression": _expressions, "words": _words}
