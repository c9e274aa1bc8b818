r"""Answers taken out of completions, and what can be said of them without Math-Verify.

`gsm8k` compares the last number of the text. `math` compares what stands in the last `\boxed{}`, else after the last
"Answer:" or a closing "####", else the last formula or number; texts and plain numbers are compared here, the rest is
for `clipctl.formulas`. Everything is linear in the length of the completion.
"""

import math
import re
import sys
import unicodedata
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from clipctl.errors import DataError

Outcome = Literal["correct", "wrong", "no_answer", "timeout", "crash", "too_long"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "timeout", "crash", "too_long")

SEARCHED_CHARACTERS = 65_536
"""The end of a completion that is searched for an answer."""
ANSWER_CHARACTERS = 2_000
"""A longer answer is `too_long`; no benchmark has one over 200."""

# --- gsm8k: the last number -----------------------------------------------------------------------------------------

FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
MINUS_SIGNS = dict.fromkeys(map(ord, "\u2212\ufe63\u2012\u2011\u2013"), ord("-"))
THIN_SPACES = dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), 0x2009)
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"))
FRACTIONS = {ord(sign): " " + unicodedata.normalize("NFKC", sign).replace("\u2044", "/") for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
SEPARATORS = {0x2044: ord("/"), 0x066B: ord("."), 0x066C: ord(",")}
PLAIN = FULLWIDTH | MINUS_SIGNS | THIN_SPACES | INVISIBLE | FRACTIONS | SEPARATORS
DIGIT_OF_ANY_SCRIPT = re.compile(r"\d")
TEX_IN_NUMBERS = (("{,}", ","), ("\\!", ""), ("\\,", "\u2009"), ("\\$", "$"), ("\\%", "%"))

CURRENCY = "$€£¥₹₽₩₺₪฿₫₦"
DIGITS = r"(?: \d{1,3} (?: [,\u2009]\d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )?"
NUMBER = re.compile(
    rf"""
    (?<![^\W_]) (?<![^\W_]_) (?<![^\W\d_]-)                         # not in a word or its index
    (?<!\^) (?<!\^-) (?<![\^_]\{{) (?<!\^\{{-) (?<!\d\.)            # nor an exponent, nor a part of a version
    (?P<sign> (?<![\w)\]}}.]) - [{CURRENCY}]? | (?<![\w)\]}}.]) [{CURRENCY}] - )?
    (?: \\[dt]?frac \{{ (?P<top>\d{{1,18}}) \}} \{{ (?P<bottom>\d{{1,18}}) \}}
      | (?<!/) (?: (?P<whole>\d{{1,18}}) [ ] )? (?P<over>\d{{1,18}}) / (?P<under>\d{{1,18}}) (?![\d/]) (?!\.\d)
      | (?P<digits> (?> {DIGITS} | (?<![\w.]) \.\d+ ) ) (?!\.\d)
        (?: [eE] (?P<e> [+-]?\d{{1,3}} ) (?!\w)
          | [ ]? (?: × | \* | \\times | \\cdot ) [ ]? 10 [ ]? \^ \{{? (?P<ten> -?\d{{1,3}} ) (?!\d) \}}? )?
    )
    """,
    re.VERBOSE | re.ASCII,
)


def last_number(text: str) -> str | None:
    r"""The last number of the text in one canonical form ("18", "-2.5", "3/4"), None where there is none.

    The rules (source: "string match of the last numerical value", arXiv 2509.26114): thousands commas, currency signs,
    percent signs, trailing dots and trailing zeros of decimals do not count, so "$1,234.50" is "1234.5" and "50%" is
    "50". Digits are read in every script. Signs count, U+2212 and full width too, but not the hyphen of "10-5". A number
    may carry a unit ("18kg"), but digits after a letter ("H2O", "week-3"), in an exponent or index ("18 cm^2", "x_3")
    and in versions ("1.2.3") are none. Powers of ten ("1.5e3", "2 × 10^3") are numbers. A fraction in lowest terms is one
    number (3/4 is 0.75, 1/3 is "1/3"); any other quotient ("36/2") is unfinished arithmetic and stays as written, equal to
    no number. Only the last SEARCHED_CHARACTERS of the text are read.
    """
    text = plain_text(text[-SEARCHED_CHARACTERS:])
    end = len(text)
    # No number spans lines, and nearly all are in the last ones: so line by line, from the end.
    while end >= 0:
        start = text.rfind("\n", 0, end) + 1
        last = _last_match(NUMBER, text, start, end)
        if last is not None:
            return _canonical(last)
        end = start - 1
    return None


def plain_text(text: str) -> str:
    if not text.isascii():
        text = DIGIT_OF_ANY_SCRIPT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text.translate(PLAIN))
    for tex, plain in TEX_IN_NUMBERS:
        text = text.replace(tex, plain)
    return text


def _last_match(pattern: re.Pattern[str], text: str, start: int = 0, end: int = sys.maxsize) -> re.Match[str] | None:
    last = deque(pattern.finditer(text, start, end), maxlen=1)
    return last[0] if last else None


def _canonical(number: re.Match[str]) -> str:
    sign = "-" if number["sign"] else ""
    if number["digits"]:
        digits = re.sub(r"[,\u2009]", "", number["digits"])
        return _plain_decimal(f"{sign}{digits}e{number['e'] or number['ten'] or 0}")
    top, bottom = int(number["top"] or number["over"]), int(number["bottom"] or number["under"])
    if bottom < 2 or math.gcd(top, bottom) != 1:
        return f"{sign}{top}/{bottom}"
    top += int(number["whole"] or 0) * bottom
    twos_and_fives = bottom
    for factor in (2, 5):
        while twos_and_fives % factor == 0:
            twos_and_fives //= factor
    if twos_and_fives != 1:
        return f"{sign}{top}/{bottom}"
    places = len(bin(bottom))
    return _plain_decimal(f"{sign}{top * 10**places // bottom}e-{places}")


def _plain_decimal(text: str) -> str:
    """Exact, without exponent, leading or trailing zeros: "018.50e0" is "18.5"."""
    plain = format(Decimal(text), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "") else plain


def grade_gsm8k(completion: str, answer: str) -> Outcome:
    """Whether the last number of the completion is that of the gold answer. Raises DataError for a gold without one."""
    gold = last_number(answer)
    if gold is None:
        raise DataError(f"answer {answer[:60]!r} has no number, which the gsm8k grader needs")
    found = last_number(completion)
    if found is None:
        return "no_answer"
    return "correct" if found == gold else "wrong"


# --- math: the last boxed answer --------------------------------------------------------------------------------------

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
ANSWER_COLON = re.compile(r"(?:\banswer\s{0,9}(?:\*\*|__)?\s{0,9}|答案)[:：]", re.IGNORECASE)
DISPLAY = re.compile(r"(\$\$|\\\[)\s*(.*?)\s*(?:\$\$|\\\])", re.DOTALL)
WRAPPERS = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
PLAIN_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
TEX_SPACING = re.compile(r"(?:\\[!,;: ]|\s|~)+")
THOUSANDS = re.compile(r"(?<=\d)(?:\\[!,;: ]|\s|~|\{,\})+(?=\d{3}(?!\d))", re.ASCII)
DELIMITER_SIZE = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
CURRENCY_AROUND = re.compile(rf"(?<![^+-])\\?[{CURRENCY}]|\\?[{CURRENCY}]$")
PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?", re.ASCII)
BASED_NUMBER = re.compile(r"[0-9A-Z]+_(?:\d+|\{\d+\})", re.ASCII)
WITH_UNIT = re.compile(r"([^a-zA-Z]*\d)(?:\\[ ,]|\s|~)+([a-zA-Z]{2,}(?:[\s/]+[a-zA-Z]+)*)\.?", re.ASCII)
CHANGING_WORDS = (
    "hundred thousand million billion trillion dozen percent half third quarter and or not to pi over by plus minus "
    "times mod sin cos tan log ln exp sqrt"
)
NO_UNITS = frozenset(CHANGING_WORDS.split(" "))
"""Words after a number that change it."""

Form = Literal["boxed", "line", "tail"]


@dataclass(frozen=True, slots=True)
class Extracted:
    """Where a completion has its answer, and the text there."""

    form: Form
    text: str


def extract_math(completion: str) -> Extracted | None:
    r"""The answer of a completion: the inside of the last closed `\boxed{}`, else the one line that follows the
    last "####" and ends the text, else what follows the last "Answer:" on its line (or the first line after it that has
    text), else the last 2000 characters, in which Math-Verify looks for the last formula or number. None where there is
    no text. Linear in the length; reads the last SEARCHED_CHARACTERS.
    """
    text = completion[-SEARCHED_CHARACTERS:]
    box = last_box(text)
    if box is not None:
        return Extracted("boxed", box) if box else None
    line = _closing_line(text) or _answer_line(text)
    if line:
        return Extracted("line", line)
    tail = text.strip()
    if len(tail) > ANSWER_CHARACTERS:
        tail = tail[-ANSWER_CHARACTERS:].partition(" ")[2]
    return Extracted("tail", tail) if tail else None


def last_box(text: str) -> str | None:
    r"""The inside of the last `\boxed{…}` whose braces close (of nested boxes the innermost), stripped, or None.

    One pass with a stack: a search from every box to its end would be quadratic in boxes that never close.
    """
    stack: list[tuple[int, int]] = []
    best_start, best = -1, None
    for token in BOX_OR_BRACE.finditer(text):
        if token[0] == "}":
            if stack:
                box_start, inside = stack.pop()
                if box_start > best_start:
                    best_start, best = box_start, text[inside : token.start()]
        elif token[0] == "{":
            stack.append((-1, token.end()))
        elif token[0].endswith("{") and len(token[0]) > 2:
            stack.append((token.start(), token.end()))
    bare = _last_match(BARE_BOX, text, max(best_start, 0))
    if bare is not None and bare.start() > best_start:
        best = bare[1]
    return None if best is None else best.strip()


def _closing_line(text: str) -> str:
    """What follows the last "####", where that is all to the end: in Markdown it heads a section as well."""
    _, marker, after = text.rpartition("####")
    after = after.strip("*_ \t\r\n")
    return after if marker and "\n" not in after and not ANSWER_COLON.search(after) else ""


def _answer_line(text: str) -> str:
    last = _last_match(ANSWER_COLON, text)
    if last is None:
        return ""
    after = text[last.end() :].lstrip("*_ \t\r\n")
    display = DISPLAY.match(after[: 2 * ANSWER_CHARACTERS])
    if display is not None:
        return f"${display[2]}$"
    return after.partition("\n")[0].strip("*_ \t\r")


def compare_cheaply(gold: str, answer: str) -> Outcome | None:
    """`correct` for equal texts and equal plain numbers, `wrong` for different integers and for different numerals with
    their base, else None: ask Math-Verify.

    Both texts may be wrapped in dollar signs or `\\text{}` and carry TeX spacing; words after a number are its unit.
    Numbers are compared as exact decimals.
    """
    gold, whole, answer = _tidy(gold), _tidy(answer), _tidy(_without_unit(answer))
    if gold in (whole, answer):
        return "correct" if gold else None
    if BASED_NUMBER.fullmatch(gold) and BASED_NUMBER.fullmatch(answer):
        return "correct" if re.sub(r"[{}]", "", gold) == re.sub(r"[{}]", "", answer) else "wrong"
    if not (PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer)):
        return None
    gold_number, number = Decimal(gold.replace(",", "")), Decimal(answer.replace(",", ""))
    if gold_number == number:
        return "correct"
    integers = gold_number == gold_number.to_integral_value() and number == number.to_integral_value()
    return "wrong" if integers else None


def is_plain_number(gold: str) -> bool:
    """Whether a gold answer can be used as it is, without Math-Verify."""
    return PLAIN_NUMBER.fullmatch(_tidy(gold)) is not None


def _without_unit(text: str) -> str:
    """The number of "18 dollars" or "4.5 km / h"; any other text as it is."""
    text = _unwrapped(text)
    found = WITH_UNIT.fullmatch(text)
    if found is None or NO_UNITS & set(re.findall(r"[a-z]+", found[2].lower())):
        return text
    return found[1] if PLAIN_NUMBER.fullmatch(_tidy(found[1])) else text


def _unwrapped(text: str) -> str:
    text = text.strip().translate(FULLWIDTH | MINUS_SIGNS | INVISIBLE).rstrip(".")
    for wrapping in (WRAPPERS, PLAIN_TEXT):
        wrapped = wrapping.fullmatch(text)
        if wrapped is not None:
            text = next(inside for inside in wrapped.groups() if inside is not None).strip()
    return text


def _tidy(text: str) -> str:
    text = THOUSANDS.sub("", DELIMITER_SIZE.sub("", _unwrapped(text)))
    # "3 4" is not 34, so a space between digits stays one.
    text = TEX_SPACING.sub(lambda space: " " if _between_digits(space) else "", text)
    text = text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return CURRENCY_AROUND.sub("", text).rstrip(".,")


def _between_digits(match: re.Match[str]) -> bool:
    text = match.string
    return text[max(match.start() - 1, 0) : match.start()].isdigit() and text[match.end() : match.end() + 1].isdigit()
