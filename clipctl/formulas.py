r"""Formulas read and compared by Math-Verify. It can hang, eat memory and, with gmpy2 installed, ignore signals, so all of
this runs only in processes that are killed from outside (`clipctl.grading_worker`).

Math-Verify decides what is equal, with its defaults. It is lenient where benchmarks are: `9\%` equals 9 and 0.09, `x=4`
equals 4, `\{1\}` equals 1, (1,2) equals the set of 1 and 2, units and upper case do not count. Three habits of it are not
taken over, because they find wrong answers right or right ones wrong: a box that is no formula and holds several numbers
stands for none of them, "1 1/2" is three halves, and signs such as ² or ½ are read.
"""

import base64
import pickle
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from clipctl.answers import CURRENCY, FRACTIONS, FULLWIDTH, INVISIBLE, NUMBER, Form, last_number, plain_text

TEX_OF_SIGN = str.maketrans(
    {
        "°": r"^\circ ", "²": "^{2}", "³": "^{3}", "√": r"\sqrt ", "∞": r"\infty ", "≈": "", "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "·": r"\cdot ", "⋅": r"\cdot ",
        "×": r"\times ", "÷": r"\div ", "±": r"\pm ", "−": "-", "–": "-", "\u2011": "-", "\u200b": "", "\ufeff": "",
    }
    | dict.fromkeys(CURRENCY.replace("$", ""), "")
    | {"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
)  # fmt: skip
PLAIN_SIGNS = FULLWIDTH | INVISIBLE | FRACTIONS | {ord("−"): "-", ord("\u2011"): "-"}
ROOT = re.compile(r"√\s?(?:\(([^()]*)\)|(\d+|\w))")
MIXED = re.compile(r"(?<![\w.}/])(\d+)[ ~](\d+)/(\d+)(?![\w./])", re.ASCII)
E_NOTATION = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])", re.ASCII)


def compare_math(parsed_gold: list[Any], form: Form, text: str) -> str:
    """The outcome of a `math` grading: what stands at the place `form` against a gold that `parse_gold` has read."""
    from math_verify import verify

    parsed = next(filter(None, _readings(form, text)), None)
    if parsed is None:
        return "no_answer"
    try:
        right = verify(parsed_gold, parsed, timeout_seconds=None, raise_on_error=True)
    except Exception:
        # One pair of expressions that sympy cannot compare must not hide another that is equal.
        if not verify(parsed_gold, parsed, timeout_seconds=None):
            raise
        right = True
    return "correct" if right else "wrong"


def parse_gold(gold: str) -> list[Any]:
    """A gold answer as Math-Verify reads it (sympy expressions, then the text); empty where it finds no expression."""
    gold = _without_dollar_amounts(gold)
    parsed = _parse(gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{_as_tex(gold)}}}") or _parse(gold)
    return parsed if _has_formula(parsed) else []


def answer_request(request: Sequence[str]) -> str:
    """`["parse", gold]` → its parsed form as text, or `bad_gold`; `["grade", parsed gold, form, text]` → an outcome."""
    kind, *rest = request
    if kind == "parse":
        parsed = parse_gold(rest[0])
        return base64.b64encode(pickle.dumps(parsed)).decode() if parsed else "bad_gold"
    gold, form, text = rest
    return compare_math(_unpickled(gold), form, text)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _unpickled(parsed: str) -> list[Any]:
    """Only ever from another worker, by way of the caller, which does not look inside."""
    formulas: list[Any] = pickle.loads(base64.b64decode(parsed))
    return formulas


def _readings(form: Form, text: str) -> Iterator[list[Any]]:
    """What the answer may mean, in the order in which to try; empty where it is not found there."""
    text = _without_dollar_amounts(text)
    if form == "boxed":
        tex = f"\\boxed{{{_as_tex(text)}}}"
        parsed = _parse(tex, formulas_only=True)
        # Else a box of several numbers that is no formula, such as "3 or 4", would stand for the last of them.
        one_number = sum(1 for _ in NUMBER.finditer(plain_text(text))) == 1
        yield parsed if _has_formula(parsed) or not one_number else _parse(tex)
        return
    plain = MIXED.sub(r"(\1+\2/\3)", text.translate(PLAIN_SIGNS))
    if form == "tail" or re.search(r"\$|\\\(|\\\[", text):
        yield _parse(plain)
    else:
        # Words read as TeX become products of letters; a formula read as plain text loses all but a number.
        words = re.search(r"[^\W\d_]{3}", text) and not re.search(r"[\\^_{}=]", text)
        tex = f"${_as_tex(text)}$"
        yield from map(_parse, [plain, tex] if words else [tex, plain])
    yield _parse(last_number(text) or "")


def _parse(text: str, *, formulas_only: bool = False) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    places = [LatexExtractionConfig()] if formulas_only else [LatexExtractionConfig(), ExprExtractionConfig()]
    parsed: list[Any] = parse(text, extraction_config=places, parsing_timeout=None, raise_on_error=True)
    return [item for item in parsed if not isinstance(item, str) or item.strip()]


def _has_formula(parsed: list[Any]) -> bool:
    return any(not isinstance(item, str) for item in parsed)


def _without_dollar_amounts(text: str) -> str:
    r"""Math-Verify reads nothing in `\$32,\!348`, and takes it for 32348 without the dollar sign."""
    return text.replace("\\$", "").replace("\\!", "")


def _as_tex(text: str) -> str:
    """Signs, powers as `**`, "1e3" and "1 1/2" in the TeX that Math-Verify's grammar knows."""
    text = ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", text).translate(TEX_OF_SIGN).replace("**", "^")
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return E_NOTATION.sub(r"\1\\cdot 10^{\2}", text)
