r"""One writing for what people write in many ways: Unicode and LaTeX, blanks and brackets, words, lists.

Nothing here computes: texts that come out equal are the same answer, others may still be.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rlzoo.rewards import _units
from rlzoo.rewards._languages import JOINED

_TEX = {
    **dict.fromkeys("−–—‒﹣", "-"),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("’‘ʹ", "'"),
    **dict.fromkeys("“”„«»", '"'),
    **{"×": r"\times ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ", "±": r"\pm "},
    **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∅": r"\emptyset "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "√": r"\sqrt ", "ℝ": r"\mathbb{R}", "θ": r"\theta "},
    **{"、": ",", "。": ".", "।": ".", "٫": ".", "⁄": "/", "∶": ":", "…": r"\ldots "},
}
"""What people type for LaTeX's commands, and the punctuation of other scripts."""

_FUNCTION = re.compile(
    "(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|lg|exp|min|max|gcd|lcm|mod|det|dim|ker|deg|arg|sup|inf|lim"
)

_REWRITE = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator marks
        (r"\.{3,}", r"\\ldots "),
        (r"\\([$%#])", r"\1"),  # currency and percent signs, escaped
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),  # sizes of brackets; \left. is an empty bracket
        (r"\\(?:displaystyle|textstyle|limits|nolimits|bf|rm|it|hfill|protect|strut)(?![A-Za-z])", ""),
        (r"\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])|\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=\d)(?:\{,\}|,?\\!|\\[,: ]|\\thinspace|~)\s*(?=\d{3}(?!\d))", ""),  # thousands: 1{,}000, 1,\!000, 1\,000
        (r"\{,\}", ","),
        (r"(?<!\\)\\(?:[,;:! >]|(?:quad|qquad|thinspace|enspace|nobreakspace)(?![A-Za-z]))|~", " "),
        (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\(?:text)?degree(?![A-Za-z])", r"^\\circ "),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:dots[bcimo]?|cdots)(?![A-Za-z])", r"\\ldots"),
        (r"\*\*(?=\s*[^\s*][^*]*\*\*)|(?<=[^\s*])\*\*(?=[^\w(]|$)|`", " "),  # Markdown's bold and code
        (r"\*\*", "^"),  # Python's power
        (r"(?<![\\A-Za-z])(pi|sqrt|infinity)(?![A-Za-z])", r"\\\1 "),  # names of what LaTeX has commands for
        (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp)(?=\s*[\d(\\^_])", r"\\\1 "),
        (r"\\infinity", r"\\infty"),
        (r"(?<![A-Za-z])([ap])\.m\.?(?![A-Za-z])", r"\1m"),
        (r"\\log_\s*(?:e|\{\s*e\s*\})(?![A-Za-z])", r"\\ln "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    )
]

_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|emph|underline|bold(?:symbol)?"
    r"|operatorname\*?|boxed|fbox)\s*\{([^{}]*)\}"
)
_TEXT = re.compile(r"(\\text\{[^{}]*\})")
_UNIT_LETTERS = frozenset("NJWVAKCFmgshlLT")
_SCRIPTS = re.compile(r"[⁰¹²³⁴-⁹⁻⁺]+")


_LONGEST = 4000
"""Characters beyond which a text is no answer that could be written otherwise."""


@lru_cache(4096)
def clean(text: str) -> str:
    r"""The text in one writing: no Markdown, no delimiters, no fonts but ``\text`` around words, few blanks."""
    if len(text) > _LONGEST:
        return " ".join(text.split())
    text = _SCRIPTS.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("−", "-") + "}", text)
    text = text if text.isascii() else "".join(_ascii(character) for character in text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # a dollar that has no partner is currency
        text = re.sub(r"(?<!\\)\$", " ", text)
    for pattern, new in _REWRITE:
        text = pattern.sub(new, text)
    for _ in range(3):  # fonts within fonts
        text = _FONT.sub(_unfonted, text)
    text = " ".join(text.split())
    text = "".join(p if p.startswith(r"\text{") else _close(p) for p in _TEXT.split(text))
    text = _trimmed(text)
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return _trimmed(whole[1]) if whole else text


def _close(text: str) -> str:
    """Without the blanks around braces, powers and indices, which OCR and tokenisers put there."""
    return re.sub(r"\s*([{}^_])\s*", r"\1", re.sub(r"\}(?= \w)", "} ", text)) if "{" in text or "^" in text else text


def _ascii(character: str) -> str:
    if character.isascii():
        return character
    if character in _TEX:
        return _TEX[character]
    if character.isdecimal():  # the digits of any script
        return str(unicodedata.decimal(character))
    if "\uff01" <= character <= "\uff5e":  # full-width
        return chr(ord(character) - 0xFEE0)
    category = unicodedata.category(character)
    if category in ("Zs", "Cf"):  # a blank of any width; what cannot be seen
        return " " if category == "Zs" else ""
    if unicodedata.decomposition(character).startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", character).partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    return character


def _unfonted(font: re.Match[str]) -> str:
    r"""What a font command holds. Words stay in ``\text``, for they are no product of letters."""
    content = font[1].strip()
    if font[0].startswith((r"\boxed", r"\fbox")):
        return f" {font[1]} "
    after_number = re.search(r"[\d}]\s*$", font.string[: font.start()])
    if _FUNCTION.fullmatch(content) and not (after_number and content in _units.SHORT):
        return rf"\{content} "
    if re.search(r"[^\W\d_]{2}", content):
        return content if font[0].startswith(r"\operatorname") else rf"\text{{{font[1]}}}"
    if content in _UNIT_LETTERS and after_number:
        return rf"\text{{{content}}}"  # 5 \text{ N}
    return f" {content} " if len(content) > 1 else content


_ORNAMENT = re.compile(r"^[→⇒∴\u25a0-\u27bf\U0001f000-\U0001faff]+|[∎\ufe0f\u25a0-\u27bf\U0001f000-\U0001faff]+$")


def _trimmed(text: str) -> str:
    """Without what may stand around an answer: punctuation, a line break, quotes, braces."""
    for _ in range(20):
        before = text
        text = _ORNAMENT.sub("", text) or text
        text = re.sub(r"^(?:[\s:;=,#]|\\\\|\.(?!\d))+|(?:\s|\\\\|[.,;:]|(?<=[^\s,;(])\s?\?)+$", "", text)
        for opening, closing in ("{}", '""', "''", "**", "__", "$$"):
            inner = text[1:-1]
            if len(text) > 2 and text[0] == opening and text[-1] == closing and _balanced(inner):
                text = inner
        if text == before:
            break
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0


def compact(text: str) -> str:
    """The clean text without blanks, and without braces around single signs: what two equal formulas share."""
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))


# Words

_SHORT = re.compile("no|on|up|us|is|it|to|of|or|so|we|me|he|in|at|as|an|am|be|by|do|go|if|my|ok", re.IGNORECASE)
"""Words of two letters, which are no product of two variables."""
_SECOND_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]+ ((?=[a-z]*[aeiou])[a-z]{3,})(?![A-Za-z])")
_ARTICLE = re.compile(r"\b(?:the|an?)\s+(?=\S)")


def words(text: str) -> str:
    """The words of a text as they are compared: case, blanks, articles, full stops and quotes make no difference."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"[\"“”.,;:!?]|(?<!\w)'|'(?!\w)|(?<=\d)(?:st|nd|rd|th)\b", " ", text).casefold()
    return " ".join(_ARTICLE.sub("", " ".join(text.split())).split())


def is_word(letters: str) -> bool:
    """Whether letters are a word rather than a product of variables."""
    short = _SHORT.fullmatch(letters) is not None or letters.lower() in _units.SHORT
    return short or len(letters) > 3 or not letters.isascii()


def is_prose(text: str) -> bool:
    r"""Whether a clean text is words rather than a formula: it has a ``\text``, letters of a word, or Chinese."""
    if r"\text{" in text or re.search("[\u3400-\u9fff]", text):
        return True
    bare = re.sub(r"\\[A-Za-z]+|\{[A-Za-z]*(?:matrix|cases|array)\}", " ", text)
    if any(not _FUNCTION.fullmatch(word) for word in _SECOND_WORD.findall(bare)):  # I get
        return True
    found = [letters for letters in re.findall(r"[^\W\d_]{2,}", bare) if not _FUNCTION.fullmatch(letters)]
    if re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]{2,})*", text) and len(text) > 2:  # nothing else: red one, but not xyz
        return any(is_word(letters) or re.search("[aeiouAEIOU]", letters) for letters in found)
    return any(is_word(letters) for letters in found)


# Lists

_OPENING = {"(", "[", "{", r"\{", r"\begin", r"\lfloor", r"\lceil"}
_CLOSING = {")", "]", "}", r"\}", r"\end", r"\rfloor", r"\rceil"}
_BRACKET = re.compile(r"\\[{}]|\\(?:begin|end|lfloor|rfloor|lceil|rceil)(?![A-Za-z])|[()\[\]{}]")
_TEXT_AND = re.compile(rf"\\text\{{\s*,?\s*{JOINED}\s*,?\s*\}}")
_SEPARATOR = re.compile(rf"[,;&]|{JOINED}|\\(?:lor|land|vee|wedge)(?![A-Za-z])")


def _outside(text: str) -> list[tuple[int, int]]:
    """The stretches of a text that stand outside all brackets."""
    depth, start, found = 0, 0, list[tuple[int, int]]()
    for bracket in _BRACKET.finditer(text):
        if bracket[0] in _OPENING:
            if depth == 0:
                found.append((start, bracket.start()))
            depth += 1
        elif bracket[0] in _CLOSING:
            depth = max(0, depth - 1)
            if depth == 0:
                start = bracket.end()
    return found if depth else [*found, (start, len(text))]


def split(text: str, separator: re.Pattern[str] = _SEPARATOR) -> list[str]:
    r"""What a clean text lists outside brackets, by commas, "and" and "or"; ``\pm`` lists both signs."""
    text = _TEXT_AND.sub(",", text)
    items, at = list[str](), 0
    for start, end in _outside(text):
        for match in separator.finditer(text, start, end):
            items.append(text[at : match.start()])
            at = match.end()
    items.append(text[at:])
    trimmed = [_trimmed(item) for item in items]
    if separator is _SEPARATOR:
        trimmed[0] = re.sub(r"^(?:\\text\{\s*)?(?:either|both)\b\s*\}?\s*", "", trimmed[0])
    return [sign for item in trimmed if item for sign in _signs(item)]


def _signs(item: str) -> list[str]:
    signs = re.findall(r"\\(?:pm|mp)(?![A-Za-z])", item)
    if len(signs) != 1:
        return [item]
    before, _, after = item.partition(signs[0])
    plus = "+" if (before and before[-1] not in "(,=[{ ") or re.search(r"[\w})] $", before) else ""
    return [_trimmed(f"{before}{sign}{after.strip()}") for sign in (plus, "-")]


def bracketed(text: str) -> tuple[str, str] | None:
    r"""The kind of the brackets around a whole clean text, such as "()" or "[)", and what they hold."""
    match = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", text, re.DOTALL)
    if match is None or len(_outside(text)) != 2:  # before it and after it
        return None
    return match[1][-1] + match[3][-1], match[2].strip()
