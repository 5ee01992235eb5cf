"""What answers are announced, listed, doubted and denied with, in the languages that models write: a row for each.

The patterns match whatever the case. Those of languages that put blanks around words match whole words only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Language(NamedTuple):
    """The words of a language, each a pattern: alternatives with "|" between, or nothing."""

    name: str
    answer: str
    """What it calls an answer,"""
    verbs: str
    """and what stands between that and the answer."""
    both: str
    """And,"""
    either: str
    """or: what lists a second answer."""
    short: str
    """And and or that are letters of formulas or words of other languages, and so list numbers only."""
    maybe: str
    """What makes an answer a candidate."""
    denied: str = ""
    """What says before an answer that it is none."""
    bounded: str = ""
    """What says before an answer that it is a bound, or only near: more than, almost."""
    spaced: bool = True
    """Whether blanks stand around words."""


LANGUAGES = (
    Language(
        "English",
        r"answers?|ans\b\.?",
        r"is|are|was|were|(?:would |must )?be|equals|becomes|comes (?:out )?to|of",
        "and|also",
        "or",
        r"(?<!\bout )of|then|through|vs|versus",
        r"maybe|perhaps|possibly|alternatively|otherwise|(?:might|may|could)(?: also| well)* be(?! \w+(?:ed|en)\b)",
        r"not|never|neither|nor|cannot|\w+n't|such as|for example|anything but|other than|except|unlike",
        r"less|more|greater|fewer|larger|smaller|higher|lower|least|most|between|over|under|above|below"
        r"|exceed(?:s|ing)?|beyond|up to|almost|nearly|close to",
    ),
    Language(
        "English", r"(?:correct|right|best) (?:option|choice|letter|statement)s?", "is|are|would be", "", "", "", ""
    ),
    Language(
        "Chinese",
        "答案|答|最终结果|故选|应选|本题选|所以选|因此选|正确选项",
        "应?该?[是为选]|等于|(?=[A-J])",
        "[和与及]",
        "或者?|还是",
        "",
        "可能|也许|或许",
        "不[是为等]|[并绝]非",
        "大于|小于|超过|多于|少于|不足|至少|至多|最多|最少|接近|几乎",
        spaced=False,
    ),
    Language("Japanese", "答え|解答|正解|回答", "は", "", "または|もしくは|あるいは", "[とか]", "たぶん", spaced=False),
    Language(
        "Korean", "정답|답변?|최종 ?답", "[은는이]", "그리고", "또는|혹은|이?거나", "", "아마|어쩌면", spaced=False
    ),
    Language(
        "Spanish",
        "respuestas?",
        "es|son|sería",
        "",
        "o bien|y/o",
        "y|e|o|u|ó",
        r"quizás?|tal vez|podrían? ser|puede ser|posiblemente",
        "no (?:es|son)|tampoco",
        "más (?:de|que)|menos (?:de|que)|(?:mayor|menor) que|entre|casi|al menos|como máximo",
    ),
    Language(
        "French",
        "réponses?",
        "est|sont|serait",
        "et",
        "ou|ou bien",
        "soit",
        "peut-être|(?:pourrait|peut) être",
        "pas|sauf",
        "(?:plus|moins) (?:de|grand|petit)|entre|presque|au (?:moins|plus)",
    ),
    Language(
        "German",
        "(?:end)?(?:antwort(?:en)?|ergebnis)|lösung",
        "lautet|ist|sind|beträgt",
        "und|sowie",
        "oder|bzw|beziehungsweise",
        "",
        "vielleicht|möglicherweise|eventuell|(?:könnte|kann) auch",
        r"nicht|kein\w*|weder|ungleich",
        "(?:mehr|weniger|größer|kleiner) als|mindestens|höchstens|zwischen|fast|beinahe",
    ),
    Language(
        "Italian",
        "rispost[ae]",
        "è|e'|sono",
        "",
        "oppure",
        "e|o|ed|od",
        "forse|magari|potrebbe(?:ro)? essere|può essere",
        "non (?:è|sono)",
        "(?:più|meno|maggiore|minore) (?:di|che)|tra|quasi|almeno",
    ),
    Language(
        "Portuguese",
        "respostas?",
        "é|são|seria",
        "",
        "ou",
        "e",
        "talvez|possivelmente|(?:pode|poderia)(?: também)? ser",
        "não (?:é|são)",
        "(?:mais|menos|maior|menor) (?:de|do|que)|entre|quase|pelo menos",
    ),
    Language(
        "Dutch",
        "(?:eind)?antwoord",
        "is|luidt",
        "",
        "ofwel",
        "en",
        "misschien|wellicht|mogelijk",
        "niet|geen",
        "(?:meer|minder|groter|kleiner) dan|tussen|bijna|minstens|hoogstens",
    ),
    Language(
        "Russian, Ukrainian",
        "ответ(?:ом)?|відповідь",
        "[-–—]|равен|равно|является|дорівнює|это|це",
        "и|і",
        "или|либо|або",
        "чи",
        "может быть|возможно|наверное|можливо|мабуть",
        "не",
        "больше|меньше|более|менее|между|почти|більше|менше|майже",
    ),
    Language(
        "Polish, Czech",
        "odpowied[źz](?:ią)?|odpověď",
        "to|jest|brzmi|wynosi|je|zní",
        "oraz",
        "lub|albo|nebo|anebo",
        "i|a",
        "może|możliwe|možná",
        "nie|není|ani",
        "(?:więcej|mniej|większ[ae]|mniejsz[ae]) niż|prawie|více než|méně než|téměř",
    ),
    Language(
        "Danish, Norwegian, Swedish",
        "svar(?:et)?",
        "är|er|blir",
        "och|og",
        "eller",
        "samt",
        "måske|kanskje|kanske",
        "inte|ikke",
        "(?:mer|mindre|större|større|flere|fler|færre) (?:enn|end|än)|mellan|mellom|mellem|nästan|nesten|næsten",
    ),
    Language("Finnish, Hungarian", "vastaus|válasz", "on|az?", "és", "tai|vagy", "ja", "ehkä|talán", "ei|nem"),
    Language("Turkish", "cevap|cevabı|yanıt", "olarak", "", "veya|ya da", "ve", "belki|olabilir"),
    Language("Romanian", "răspuns(?:ul)?", "este|e", "și", "sau", "", "poate|posibil", "nu (?:este|e)"),
    Language("Greek", "απάντηση", "είναι", "και", "ή", "", "ίσως", "δεν"),
    Language("Vietnamese", "đáp án|đáp số|câu trả lời", "là", "và", "hoặc", "hay", "có thể|có lẽ", "không phải"),
    Language("Indonesian, Malay", "jawaban(?:nya)?|jawapan", "adalah|ialah", "", "atau", "dan", "mungkin", "bukan"),
    Language("Swahili", "jibu", "ni", "", "", "na|au", "labda"),
    Language("Arabic, Persian", "الجواب|الإجابة|الاجابة|جواب|پاسخ", "هو|هي", "", "أو", "و|یا", "ربما|شاید", "ليست?"),
    Language("Hebrew", "התשובה|תשובה", "היא|הוא", "", "או", "", "אולי", "אינ[הו]"),
    Language("Hindi, Bengali", "उत्तर|जवाब|উত্তর", "है|हैं|हल|হল|হলো|হচ্ছে", "और|এবং", "या|বা|অথবা", "", "शायद|হয়তো"),
    Language("Telugu, Tamil", "సమాధానం|பதில்", "=", "మరియు|மற்றும்", "లేదా|அல்லது", "", ""),
    Language("Thai", "คำตอบ", "คือ", "และ", "หรือ", "", "อาจจะ|บางที", "ไม่ใช่", spaced=False),
)
DENIED_AFTER = "では?(?:ありません|ない|なく)|じゃない|아니|아닙|아닌|değil|नहीं|নয়|نیست"
"""What denies an answer that stands before it, in Japanese, Korean, Turkish, Hindi, Bengali and Persian."""
BOUNDED_AFTER = (
    r"(?:or|and) (?:any|more|less|fewer|greater|above|below|higher|lower|over|under)\b|at (?:most|least)\b|以上|以下"
)
NOW = (
    "therefore|thus|then|hence|now|simply|just|equal to|also|consequently|so|exactly|probably|likely|donc|somit|daher"
    "|dus|quindi|dunque|entonces|então|portanto|значит|zatem|więc|tedy|altså|alltså"
)
"""What may stand between "the answer is" and the answer."""


def _patterns(spaced: bool, columns: tuple[str, ...]) -> Iterator[str]:
    for language in LANGUAGES:
        found = (str(getattr(language, column)) for column in columns)
        yield from (pattern for pattern in found if pattern and language.spaced == spaced)


def _any(*columns: str) -> str:
    """A pattern for those columns of all languages."""
    apart, within = ("|".join(_patterns(spaced, columns)) for spaced in (True, False))
    return rf"(?:(?<![^\W\d_\\])(?:{apart})(?![^\W\d_])|{within})"


EITHER, MAYBE, DENIED, BOUNDED = map(_any, ("either", "maybe", "denied", "bounded"))
JOINED = _any("both", "either")
"""What lists answers of any kind;"""
JOINED_NUMBERS = _any("both", "either", "short")
"""and what does so between numbers."""
CONJUNCTIONS = frozenset(word for pattern in _patterns(True, ("both", "either")) for word in pattern.split("|"))


def _phrase(language: Language) -> str:
    """The noun, a few words on it, and a verb or colon; or the noun a little before a number."""
    noun, verb = f"(?:{language.answer})", rf"(?:{language.verbs})(?:\s*[:：])?"
    if language.spaced:
        noun, verb = rf"{noun}(?!\w)", rf"(?<!\w)(?:{language.verbs})(?!\w)(?:\s*:)?"
    same_sentence = r"[^\n.!?。:：=]"
    after = rf"{same_sentence}{{0,60}}?(?:\s*[:：=]|\s[-–—](?=\s)|{verb})"
    before_number = rf"(?:(?!\\[A-Za-z]){same_sentence}){{0,20}}?(?=\s*(?:[$\d]|\\[(\[]))"
    return rf"{noun}(?:{after}|{before_number})"


_SPACED, _UNSPACED = ("|".join(_phrase(one) for one in LANGUAGES if one.spaced == spaced) for spaced in (True, False))
_LETTER = (
    r"(?:I(?: would|'d| will|'ll| have| must)? (?:choose|chose|chosen|pick|select|go (?:with|for)|say)|it is|so|thus"
    r"|which is|(?<!not )(?<!n't )(?:corresponds? to|match(?:es)?))"
    r" (?:(?:the )?(?:option|choice|answer) )?(?=\(?[A-J]\)?\W*(?:$|[.,:\n]|because|since))"
)
"""What announces the letter of a choice: I choose B."""
PHRASE = rf"(?<!\w)(?:{_SPACED}|{_LETTER})|{_UNSPACED}"
"""What announces an answer: the answer is, the correct choice is."""
