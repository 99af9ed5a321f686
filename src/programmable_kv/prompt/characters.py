"""Characters in values: which ones hide something, which joiners a language or an emoji needs, and texts made comparable.

A value is compared with names and markers in the form that `folded` gives it, so that another spelling of the same letters
(full width, look-alikes from other alphabets, marks over letters) is still found.
"""

from __future__ import annotations

import re
import unicodedata

BYTE_ORDER_MARK = "\ufeff"

_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"})
"""control, format (zero width, direction), private use, surrogate, unassigned, line and paragraph separators"""
_BLANKS = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffc\U0001d159\U00016fe4"
)
"""characters that show as nothing, though Unicode calls them letters, marks or symbols"""
_JOINERS = frozenset("\u200c\u200d")
_EMOJI_STYLE = frozenset("\ufe0e\ufe0f")
_MONGOLIAN_SELECTORS = frozenset("\u180b\u180c\u180d\u180f")
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_JOINING_SCRIPTS = ("ARABIC ", "SYRIAC ", "NKO ", "MANDAIC ", "MONGOLIAN ")
_INDIC_SCRIPTS = (
    "DEVANAGARI ", "BENGALI ", "GURMUKHI ", "GUJARATI ", "ORIYA ", "TAMIL ", "TELUGU ", "KANNADA ", "MALAYALAM ",
    "SINHALA ",
)  # fmt: skip
_VIRAMA_CLASS = 9
"""the canonical combining class of the sign that removes an Indic consonant's vowel"""
_PICTOGRAPHS = ((0x2190, 0x21FF), (0x2300, 0x27BF), (0x2900, 0x297F), (0x2B00, 0x2BFF), (0x1F000, 0x1FAFF))
"""arrows, technical symbols, dingbats, and the planes of emoji. Unicode keeps the last range for visible ones, so one that this
Python does not know yet is an emoji all the same"""
_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD))
_FLAGS = ("gbeng", "gbsct", "gbwls")
"""the regions whose flag is written with tag characters, which are invisible otherwise"""
_FLAG = re.compile(
    "\U0001f3f4(?:" + "|".join("".join(chr(0xE0000 + ord(c)) for c in f) for f in _FLAGS) + ")\U000e007f"
)

_LOOKALIKES = str.maketrans(
    {
        **dict(zip("аеорсухіјѕһԁԛԝкмтнвг", "aeopcyxijshdqwkmtnbr", strict=True)),  # Cyrillic
        **dict(zip("αειοκνρτυχω", "aeioknptuxw", strict=True)),  # Greek
        **dict(zip("ıɑɡʟ", "iagl", strict=True)),
        **dict.fromkeys("꞉∶ː׃", ":"),
        **dict.fromkeys("→⇒➔➜⟶⟹➝", ">"),
        **dict.fromkeys("←⇐⟵⟸", "<-"),
        **dict.fromkeys("≔≡≝≕", "="),
    }
)


def without_byte_order_mark(text: str) -> str:
    """A file's first character may be a mark that says how it is encoded. It is no part of its text."""
    return text.removeprefix(BYTE_ORDER_MARK)


def first_hidden(text: str, *, lines: bool = False) -> str | None:
    """The first character that shows as nothing, or acts on how others show, where no language and no emoji needs it.

    `lines`: line breaks and tabs are allowed.
    """
    if text.isascii() and text.isprintable():
        return None
    flags = {at for match in _FLAG.finditer(text) for at in range(match.start() + 1, match.end())}
    for at, character in enumerate(text):
        if lines and (character in "\n\t" or (character == "\r" and text[at + 1 : at + 2] == "\n")):
            continue
        if at not in flags and _hidden(text, at):
            return character
    return None


def _hidden(text: str, at: int) -> bool:
    character = text[at]
    code = ord(character)
    if character in _JOINERS:
        return not _joins(text, at)
    if character in _EMOJI_STYLE:
        return not (at and (_is_pictograph(text[at - 1]) or text[at - 1] in "#*0123456789©®‼⁉™ℹ〰〽㊗㊙"))
    if 0xFE00 <= code <= 0xFE0F:
        return True
    if 0xE0100 <= code <= 0xE01EF:  # which form of an ideograph is meant, as in Japanese names
        return not (at and _within(ord(text[at - 1]), _IDEOGRAPHS))
    if character in _MONGOLIAN_SELECTORS:
        return not (at and unicodedata.name(text[at - 1], "").startswith("MONGOLIAN LETTER"))
    if character in _BLANKS:
        return True
    category = unicodedata.category(character)
    if category == "Cn":
        return not (_is_pictograph(character) or _within(code, _IDEOGRAPHS))
    return category in _REFUSED_CATEGORIES


def _joins(text: str, at: int) -> bool:
    """Whether a zero-width (non-)joiner stands where writing needs one.

    Source: RFC 5892, appendix A.1 and A.2, for scripts; Unicode Technical Standard 51, 2.3, for emoji.
    """
    if at and unicodedata.combining(text[at - 1]) == _VIRAMA_CLASS:
        return True
    if not 0 < at < len(text) - 1:
        return False
    before, after = text[at - 1], text[at + 1]
    if unicodedata.combining(after) == _VIRAMA_CLASS and unicodedata.name(before, "").startswith(_INDIC_SCRIPTS):
        return True
    if text[at] == "\u200d" and _is_pictograph(after):
        base = at - 1
        while base > 0 and (text[base] in _EMOJI_STYLE or text[base] in _SKIN_TONES):
            base -= 1
        return _is_pictograph(text[base])
    base = at - 1
    while base > 0 and unicodedata.category(text[base]) == "Mn" and text[base] not in _BLANKS:
        base -= 1
    script = next((s for s in _JOINING_SCRIPTS if unicodedata.name(text[base], "").startswith(s)), None)
    return (
        script is not None and text[base].isalpha() and after.isalpha() and unicodedata.name(after).startswith(script)
    )


def _is_pictograph(character: str) -> bool:
    return _within(ord(character), _PICTOGRAPHS)


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= code <= high for low, high in ranges)


def folded(text: str) -> str:
    """Text to compare: compatibility forms, case, look-alikes and marks on letters make no difference.

    For comparing only: it loses what other languages need.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    if plain.isascii():
        return plain
    letters = (c for c in unicodedata.normalize("NFKD", plain) if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return "".join(letters).translate(_LOOKALIKES)


def words_of(text: str) -> str:
    """Letters and digits of a text, folded, with single spaces between words, whatever stood between them."""
    return " ".join("".join(c if c.isalnum() else " " for c in folded(text)).split())


def spelled_together(text: str) -> str:
    """With words that are spelled letter by letter (`r o l e`, `r-o-l-e`) written as one."""
    return _SPELLED.sub(lambda match: re.sub(r"[\W_]", "", match.group()), text)


_SPELLED = re.compile(r"(?<![^\W_])[^\W_](?:[ .\-_*·][^\W_]){2,}(?![^\W_])")
