"""How the number is found in what a language model writes: where there is one reading only, in whatever dress.

`vlm_judge.py` calls it. What a model thinks before it speaks never counts. Everything that could mean something else
(a range, a decimal comma, a number in a sentence) is no number here.
"""

import json
import re
import unicodedata

from kto_ray.score.scorers.http import BadReply, excerpt

NUMBER = r"([+-]?\d+(?:\.\d+)?)"
DRESS = r"[\s*_`\"'“”]*"
VALUE = re.compile(
    rf"{DRESS}{NUMBER}{DRESS}(?:(?:/|out of){DRESS}{NUMBER}{DRESS})?\.?{DRESS}", re.ASCII | re.IGNORECASE
)
NAMES = r"(?:(?:final|overall|total) )?(?:score|rating)|分数|评分|得分"
LINE = re.compile(rf"(?:#+|>|-)?{DRESS}(?:{NAMES}){DRESS}[:=](.*)", re.IGNORECASE)
MARKED = (
    re.compile(r"<(?:answer|score|rating)>([^<>]*)</(?:answer|score|rating)>\s*$", re.IGNORECASE),
    re.compile(r"\\boxed\{([^{}]*)\}[\s$.]*$"),
    re.compile(r"\[\[([^\[\]]*)\]\][\s.]*$"),
)
FENCED = re.compile(r"```\w*\n((?:(?!```).)*)```\s*$", re.DOTALL)
END_TOKENS = re.compile(r"(?:\s?(?:<\|\w+\|>|</s>|<end_of_turn>|<eos>))+$")
THOUGHT = re.compile(r"[<◁]/think(?:ing)?[>▷]", re.IGNORECASE)
THINKING = re.compile(r"[<◁]think(?:ing)?[>▷]", re.IGNORECASE)
LONGEST = 100
"""A place for a number that has more letters holds none."""
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def read_number(text: str, low: float, high: float, pattern: str | None = None) -> float:
    """The number that a judge gives.

    It is all that is said; or stands at the end, in a line "Score: 7" (or "Rating:", "Final score: 7/10", ...), in an
    object with a key "score" or "rating", in `<answer>`, `\\boxed{}` or `[[ ]]`. Markdown, code fences, end tokens and
    full-width letters make no difference.

    Args:
        low, high: the scale.
        pattern: a regular expression instead of these rules: the first group of its last match is the number.

    Raises:
        BadReply: no such number, one outside of low..high, or a thought that does not end.
    """
    said = THOUGHT.split(text)[-1]
    if THINKING.search(said):
        raise BadReply(f"the judge's thought has no end: {excerpt(text)}")
    if pattern is None:
        found, wanted = _number(said), "does not end with 'Score: <number>'"
    else:
        matches = list(re.finditer(pattern, said))
        found, wanted = matches[-1][1] if matches else None, f"has no number where {pattern!r} looks for one"
    value = VALUE.fullmatch(found) if found and len(found) <= LONGEST else None
    if value is None:
        raise BadReply(f"the judge's answer {wanted}: {excerpt(text)}")
    number, *top = (float(group) for group in value.groups() if group is not None)
    if not low <= number <= high or top not in ([], [high]):
        raise BadReply(f"the judge's number is not on the scale from {low:g} to {high:g}: {excerpt(text)}")
    return number


def _number(said: str) -> str | None:
    """Where the number must be, if there is such a place."""
    plain = "".join(letter for letter in said.translate(FULL_WIDTH) if unicodedata.category(letter) != "Cf")
    plain = END_TOKENS.sub("", plain.strip()).strip()
    if fenced := FENCED.search(plain):
        plain = fenced[1].strip()
    last = plain.rpartition("\n")[2].strip()
    for text in (plain, last):
        if (number := _of_object(text)) is not None:
            return number
    for place in MARKED:
        if marked := place.search(plain):
            named = LINE.fullmatch(marked[1].strip())
            return named[1] if named else marked[1]
    if named := LINE.fullmatch(last):
        return named[1]
    return plain if last == plain else None


def _of_object(text: str) -> str | None:
    if not text.startswith("{"):
        return None
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    numbers = [value for key, value in pairs if key.lower() in ("score", "rating")]
    is_one = len(numbers) == 1 and isinstance(numbers[0], int | float | str) and not isinstance(numbers[0], bool)
    return str(numbers[0]) if is_one else None
