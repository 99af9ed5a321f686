"""Characters in values: finds hidden ones, allows the joiners that scripts and emoji need, and folds text to compare.

The guard compares values with names and markers in the form that `folded` returns, so it also finds other spellings of
the same letters (full width, look-alikes from other alphabets, marks over letters).
"""

from __future__ import annotations

import re
import unicodedata

BYTE_ORDER_MARK = "\ufeff"

_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"})
"""Control, format (zero width, direction), private use, surrogate, unassigned, line and paragraph separators."""
_BLANKS = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffc\U0001d159\U00016fe4"
)
"""Characters that display as nothing although Unicode classes them as letters, marks or symbols."""
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
"""The canonical combining class of the sign that removes an Indic consonant's vowel."""
_PICTOGRAPHS = ((0x2190, 0x21FF), (0x2300, 0x27BF), (0x2900, 0x297F), (0x2B00, 0x2BFF), (0x1F000, 0x1FAFF))
"""Arrows, technical symbols, dingbats, and the emoji planes. Unicode reserves the last range for visible characters, so
a character there that this Python does not know yet also counts as an emoji."""
_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD))
_FLAGS = ("gbeng", "gbsct", "gbwls")
"""The regions whose flags are written with tag characters, which are invisible elsewhere."""
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
    """The text without the byte order mark that a file may begin with."""
    return text.removeprefix(BYTE_ORDER_MARK)


def first_hidden(text: str, *, lines: bool = False) -> str | None:
    """The first character that is invisible or changes how others display, unless a script or an emoji needs it there.

    `lines`: whether line breaks and tabs are allowed.
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
    if 0xE0100 <= code <= 0xE01EF:  # selects the form of an ideograph, as in Japanese names
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
    """Whether a zero-width joiner or non-joiner stands where a script or an emoji needs one.

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
    """The text in a form that ignores compatibility forms, case, look-alikes and marks on letters.

    Use it for comparison only: it removes distinctions that other languages need.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    if plain.isascii():
        return plain
    letters = (c for c in unicodedata.normalize("NFKD", plain) if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return "".join(letters).translate(_LOOKALIKES)


def words_of(text: str) -> str:
    """The letters and digits of a text, folded; everything between words becomes one space."""
    return " ".join("".join(c if c.isalnum() else " " for c in folded(text)).split())


def spelled_together(text: str) -> str:
    """The text with words spelled letter by letter (`r o l e`, `r-o-l-e`) joined."""
    return _SPELLED.sub(lambda match: re.sub(r"[\W_]", "", match.group()), text)


_SPELLED = re.compile(r"(?<![^\W_])[^\W_](?:[ .\-_*·][^\W_]){2,}(?![^\W_])")
