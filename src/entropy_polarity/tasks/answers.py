r"""The final answer in a completion, and one notation for it: text only, nothing is computed and nothing evaluated.

`boxed` finds the answer; `normalised` writes what people and programs write in many ways in the one way that
math-verify's parser reads as it is meant. Each rule below is one that the parser lacks or gets wrong (0.9.0).
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
# What may stand between boxes that together list an answer: `$x = \boxed{3}$ and $y = \boxed{7}$`, nothing more.
_LISTING = re.compile(r"(?:[\s$,;&]|\\[()\[\],;:! ]|\\q?quad\b|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\b\w\s*=)*")
_LISTS = re.compile(r"[,;]|\b(?:and|or)\b|\\q?quad")


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{}: None where there is no box, "" where the last one is not closed.

    The last box withdraws the earlier ones. Boxes with nothing but commas, "and" or "or" between them are one list.
    A completion that was cut off inside a box gives no answer, and never an earlier one. Empty boxes do not count.

    >>> boxed(r"\boxed{4}? No: \boxed{9}."), boxed(r"\boxed{3} and \boxed{7}"), boxed(r"\boxed{9} or rather \boxed{4")
    ('9', '3, 7', '')
    """
    boxes = []
    place = 0
    while start := _BOX.search(text, place):
        held, place = _held(text, start.end())
        if held is None:
            return ""
        if held.strip():
            boxes.append((start.start(), place, held.strip()))
    if not boxes:
        return "" if place else None
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : listed[0][0]]
        if not (_LISTS.search(between) and _LISTING.fullmatch(between)):
            break
        listed.insert(0, box)
    return ", ".join(dict.fromkeys(held for _, _, held in listed))


def _held(text: str, start: int) -> tuple[str | None, int]:
    """What a command's argument at `start` holds, and where it ends; None where its brace is not closed."""
    if not text.startswith("{", start):
        bare = re.compile(r"[^\s$,;{}]*").match(text, start)
        assert bare is not None
        return bare[0].rstrip(".") or None, bare.end()
    end = _closing(text, start, "{", "}")
    return (None, len(text)) if end is None else (text[start + 1 : end], end + 1)


def _closing(text: str, start: int, opening: str, closing: str) -> int | None:
    """The place of what closes the bracket at `start`; escaped braces are text."""
    depth = 0
    escaped = False
    for place in range(start, len(text)):
        character = text[place]
        if not escaped:
            depth += (character == opening) - (character == closing)
        if depth == 0:
            return place
        escaped = character == "\\" and not escaped
    return None


def tagged(text: str, tag: str = "answer") -> str | None:
    """What stands in the last <tag> of a text: None where there is no such tag, "" where the last is not closed.

    >>> tagged("<answer>4</answer> no: <answer>9</answer>"), tagged("<answer>4</answer> no: <answer>9")
    ('9', '')
    """
    _, found, last = text.rpartition(f"<{tag}>")
    if not found:
        return None
    inside, closed, _ = last.partition(f"</{tag}>")
    return inside.strip() if closed else ""


_SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ",
    "€": "", "£": "", "¥": "", "\t": " ", "\n": " ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
})  # fmt: skip
_TEXT = r"\\(?:text|mbox|mathrm|mathit|mathbf|mathsf|textrm|textit|textbf|operatorname|rm)"
_NUMERAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_GAP = r"(?:\s|~|\\[,;:! ])"
_END = r"(?=\s*(?:$|[,;]))"
_NO_UNIT = r"\s*(?:and|or|[a-zA-Z](?<![cdghlmstLNJWVAKCF]))\s*"  # a connective, a variable
_POWER = r"(?:\^(?:\d|\{\d\}))?"
# Of two letters and more, so that no product of variables is among them.
_UNIT = (
    r"(?:[ckm]m|[km]g|m[lL]|ft|lbs?|hrs?|mins?|secs?|mph|k[mp]ph|inch(?:es)?|feet|foot|yards?|miles?|met(?:er|re)s?|"
    r"centimet(?:er|re)s?|kilomet(?:er|re)s?|acres?|hectares?|lit(?:er|re)s?|gallons?|grams?|kilograms?|pounds?|"
    r"ounces?|tons?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|degrees?|deg|dollars?|cents?|euros?|rupees?|"
    r"units?|square|sq|cubic|cu|people|students?|children|apples?|coins?|books?|meals?|tiles?|pieces?|points?|times|"
    r"ways?)"
)
_TIMES = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}", "trillion": "10^{12}",
          "dozen": "12"}  # fmt: skip
# Text after a number that says another number, or takes it back: no unit.
_NO_MEASURE = (
    r"\b(?:or|not|no|is|less|more|most|least|squared|cubed|factorial|half|halves|"
    r"(?:third|fourth|fifth|sixth|eighth|tenth|hundredth|thousandth|millionth)s?)\b"
)
_UNITS = rf"{_UNIT}(?:{_GAP}*(?:(?:per|/){_GAP}*)?{_UNIT})*(?:/[hs])?{_POWER}"
_CODE = r"(?<![a-zA-Z\\])(?:np|numpy|math|sympy|sp)\."
_ARGUMENT = r"(?<![_^])(?<!\\frac )(?<!\\frac)(?<!\\binom )(?<!\\binom)(?<!\\sqrt )"
_RULES = [
    (re.compile(pattern), by)
    for pattern, by in [
        (r"^\s*=\s*(?=[^=]*$)", ""),  # "= 10"
        (r"\{([:,!])\}", r"\1"),  # 12{:}30, 1{,}000
        (r"\\\$|\$", ""),  # money: inside an answer a dollar opens no mathematics
        (r"\\(?:left|right|big|Big|bigl|bigr|displaystyle|limits)(?![a-zA-Z])\.?", ""),
        # Groups of three digits.
        (r"(?<=\d)(?:,?\\!\s*|\\[,;:]\s*|\\ |~)(?=\d{3}(?!\d))", ""),
        (r"^(\s*-?\d{1,3}) (\d{3}) (\d{3})(?![\d ])", r"\1\2\3"),
        (r"^(\s*-?\d{1,3}) (\d{3})(?![\d ])", r"\1\2"),
        (_TEXT + r"\s*\{\s*([eiπ])\s*\}", r"\1 "),  # an upright constant
        (rf"(?<![\w.])({_NUMERAL})[eE]([+-]?\d+)(?!\w|\.\d)", r"(\1*10^{\2})"),
        # Number words, in text and bare.
        (rf"(?<=[\d}}]){_GAP}*({_TEXT}\s*\{{|)\s*({'|'.join(_TIMES)})\b", lambda n: rf"\times {_TIMES[n[2]]} {n[1]}"),
        # Units: text after whatever, and words after a number.
        (
            rf"(?<=[^\s,;]){_GAP}*{_TEXT}\s*\{{(?!{_NO_UNIT}\}}|[^{{}}]*{_NO_MEASURE})[^{{}}\\]*\}}{_POWER}{_END}",
            "",
        ),
        (rf"(?<=[\d}}]){_GAP}*{_UNITS}{_END}", ""),
        # A programmer's notation.
        (rf"{_CODE}log(?![a-zA-Z0-9])", r"\\ln "),
        (rf"{_CODE}(?=[a-z])", ""),
        (r"\*\*\s*(-?\d+)", r"^{\1}"),
        (r"\*\*", "^"),
        (r"\^\s*(-\d+)", r"^{\1}"),
        # The parser adds numerals that stand side by side, as in a mixed fraction: 2 3 is no 5.
        (rf"{_ARGUMENT}(?<![\d.])({_NUMERAL})(?:{_GAP}|\\q?quad)+(?=\d)", r"\1, "),
        (r"\\q?quad(?![a-zA-Z])", ", "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        # A derivative is another function: the parser drops the mark.
        (r"(?<=[a-zA-Z])'(?=\s*(?:[(=+\-*/^,]|$))", r"_{d}"),
        (r"[\s.,;]+$", ""),
    ]
]
_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(a(?:rc)?(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|sqrt|pi)(?![a-zA-Z])"
)
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_PARENTHESES = re.compile(r"(?:\\sqrt|\^)\s*(?=\()")


def normalised(latex: str) -> str:
    r"""An answer in the notation that math-verify reads: units, money and spacing gone, names with their backslash.

    A letter is a factor and stays; a unit is a word, or stands in \text{}.

    >>> normalised(r"\$32,\!348"), normalised("4.5e33"), normalised(r"5 \text{ cm}"), normalised("k m")
    ('32348', '(4.5*10^{33})', '5', 'k m')
    >>> normalised("np.arcsin(10/13)"), normalised(r"6\sqrt(5)"), normalised(r"0.1\overline{6}")
    ('\\arcsin(10/13)', '6\\sqrt{5}', '(\\frac{15}{90})')
    """
    text = latex.translate(_SIGNS)
    for pattern, by in _RULES:
        text = pattern.sub(by, text)
    return _in_braces(_REPEATING.sub(_fraction, _FUNCTION.sub(_named, text)))


def _named(name: re.Match[str]) -> str:
    return f"\\{_NAMES.get(name[1], name[1])}" + (" " if name[1] == "pi" else "")


def _fraction(number: re.Match[str]) -> str:
    """The fraction that a repeating decimal is: 0.1666... = (16 - 1) / 90."""
    whole, fixed, repeated = (number[1] or "0"), number[2], number[3]
    above = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"(\frac{{{above}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}})"


def _in_braces(text: str) -> str:
    r"""\sqrt(a) and x^(a) with braces instead: elsewhere the parser takes what follows for a factor."""
    parts, place = [], 0
    while start := _PARENTHESES.search(text, place):
        end = _closing(text, start.end(), "(", ")")
        if end is None:
            break
        parts.append(text[place : start.end()].rstrip())
        text, place = f"{text[: start.end()]}{{{text[start.end() + 1 : end]}}}{text[end + 1 :]}", start.end()
    return "".join([*parts, text[place:]])


_DIGITS = {
    word: str(base)
    for base, word in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)
}
_BASE = re.compile(rf"(?<![\w}}])\d\w*_(?:\{{(?:{_TEXT}\s*\{{)?\s*(?:base\s*)?(\w+)\s*\}}*|(\d))")


def bases(text: str) -> list[str]:
    r"""The bases in which the numerals of an answer are written, where it says so; the parser does not look at them.

    >>> bases("4210_{5}"), bases(r"52_8, 12_{\text{nine}}"), bases("x_1 + 17")
    (['5'], ['8', '9'], [])
    """
    found = [str(wide or narrow) for wide, narrow in _BASE.findall(text)]
    return sorted(_DIGITS.get(base, base) for base in found)


def clock(text: str) -> tuple[int, ...] | None:
    """Hours and minutes, where an answer has the form of a time of day: the parser divides them.

    >>> clock("12:30"), clock("9:05 p.m."), clock("2:3")
    ((12, 30), (9, 5), None)
    """
    time = re.fullmatch(r"\s*(\d{1,2})(?::|\{:\}):?(\d{2})\b(?!:)[\s\\a-zA-Z{}.,~]*", text)
    return (int(time[1]), int(time[2])) if time else None


def without_unit(text: str) -> str:
    r"""A numeral without the letter after it, which with a space between them can be a unit: 5 m, 9.8\,N."""
    return re.sub(rf"^(\s*-?{_NUMERAL}){_GAP}+[mgshlLNJWVAKCF](?:\^\{{?\d\}}?)?$", r"\1", text)


def word(text: str) -> str | None:
    r"""The word or words that an answer is: letter by letter the parser takes them for a product, east for seat.

    >>> word(r"\text{East}"), word("no  solution"), word("abc"), word("2 x")
    ('east', 'no solution', None, None)
    """
    bare = re.sub(rf"{_TEXT}\s*\{{([^{{}}\\]*)\}}", r"\1", text).strip(" .")
    return " ".join(bare.lower().split()) if re.fullmatch(r"[a-zA-Z][a-zA-Z ]{2,}[a-zA-Z]", bare) else None


def has_letters(latex: str) -> bool:
    r"""Whether variables stand in it; names of commands are none.

    >>> has_letters(r"\frac{1}{2}"), has_letters(r"\frac{1}{m}")
    (False, True)
    """
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", latex)))
