"""The guard of values: a value from outside is data, and must not pass for a role or for an update of another field.

The guard judges what a value can tell a model, not single words. It refuses a value and never rewrites it, since a
silently changed value is a wrong value. `tests/prompt/` has tables of refused and of accepted values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidValueError
from programmable_kv.prompt.characters import first_hidden, folded, spelled_together, words_of
from programmable_kv.prompt.fields import FieldKind, FieldType

_HARMLESS = re.compile(
    r"endof(text|file|prompt)|fim[ _-]?\w+|file[ _-]?\w+|repo[ _-]?\w+|(image|video|audio|vision|box|quad|object)\w*|"
    r"pad\w*|mask|unk|cls|sep|extra\w*|placeholder\w*|dummy\w*"
)
"""Special tokens, inside `<|...|>`, that say nothing about who speaks. They are accepted as plain text."""
_MARKED = re.compile(r"<\|\s*([^<>|]{1,40}?)\s*\|>|\[\|\s*[^\[\]|]{1,40}\|\]")
_MARKERS = re.compile(
    r"\[/?(inst|tool_?calls?|tool_?results?|available_?tools|system_?prompt|tool_?content|args|call_id|gmask|think)\]"
    r"|<</?sys>>"
    r"|<(start|end)_of_turn>|</?turn>|</?s>|</?[be]os>|<[se]op>|<eo[ahst]>"
    r"|</?(thinking|think|thought|reasoning)>"
    r"|</?(tool|function|api|mcp)_?-?(calls?|responses?|results?|outputs?|use)>|</?functioncall>|</?(tools|function=[^>]*)>"
    r"|</?(system|assistant|developer|system_?prompt|system-reminder|human|bot)>"
    r"|<_(system|user|bot|end)>|<reserved_\d+>|<unused\d+>|\[unused_token_\d+\]"
    r"|###\s*(system|instructions?|response|input|human|user|assistant|question|answer|output)\b\s*:?"
)
"""Markers of any chat format, folded. `_check_markers` also refuses a tokenizer's own tokens in its chat template."""
_LONG_RUN = re.compile(r"\W{64,}")
_REPEATED = re.compile(r"(\W)\1+")
_LONGEST_RUN = 128
_NAMES = 4096
"""Number of field names whose patterns are kept: every value is searched for the name of every other field."""
_SQUEEZED = re.compile(r"\s*([<>\[\]|/_])\s*")
_ROLE = r"(?:system|assistant|developer|user|tool|human|ai)"
_ROLE_LINE = re.compile(
    rf"(?:^|[\n\r]|[.;!?,:>|)\]}}\"'`*#=~+•]\s+|[(\[{{\"'`*#>|•;!?,]\s*|\s[-–—]\s*)\W*?(?<!--)(?<![@/\w]){_ROLE}[\s*_`\"')\]}}>]*:(?!//)(?!\S+@)"
)
"""A role word that begins a clause, and a colon; not `operating system: x` and not `https://user:password@host`."""
_ROLE_TAG = re.compile(r"(?:^|\n|[.;!?:,]\s)\W*[\[(<{*_]+\s*(?:system|assistant|developer)\s*[\])>}*_]+")

_SIGN = r"(?::=?|==?>?|-+>|~>|>|<-+|:|—)"
_VERB = (
    r"(?:is|are|was|were|be|being|been|becomes?|became|changes?|changed|sets?|has|had|now(?=[ \t]+\w)|equals?|stands|stays|"
    r"remains|goes|went|"
    r"moves?|moved|turns?|turned|will|shall|must|should|can|may|reads?|means|gets?|got|updated|reset|switched|raised|lowered|"
    r"upgraded|promoted|granted)"
)
_GIVE = r"(?:set|make|treat|consider|assume|grant|assign|give)"
_CHANGE = (
    r"(?:set|sets|changed?|changes|updated?|switch(?:ed)?|raised?|lowered?|moved?|promoted?|upgraded?|reset|made|"
    r"override|overwrite)"
)


def check_value(
    name: str, text: str, tokenizer: Any, template: str, names: Iterable[str] = (), *, lines: bool = False
) -> None:
    """Refuse a value, as it stands in the text, if a model could read it as anything but a value.

    Args:
        tokenizer: None if another program tokenises the text; then only the usual forms of chat formats' markers are
            known.
        template: the wording of an erratum.
        names: the names of the context's fields.
        lines: whether the value may have several lines, be empty, and begin or end with white space.

    Raises:
        InvalidValueError: the value is not a string; is empty, has several lines, or begins or ends with white space,
            where that is not allowed; or contains characters that hide something, a role marker of any chat format, the
            words of the erratum template, or a statement about another field.
    """
    if not isinstance(text, str):
        raise InvalidValueError(f"the value of {name} must be a string, got {type(text).__name__}. Convert it first.")
    if not lines and not text.strip():
        raise InvalidValueError(
            f"the value of {name} is empty. Give it a text such as 'none', or declare "
            'Field(value, kind="block"), which may be empty.'
        )
    if not lines and text != text.strip():
        raise InvalidValueError(f"the value of {name} starts or ends with white space: {text!r}. Strip it first.")
    hidden = first_hidden(text, lines=lines)
    if hidden is not None:
        _refuse_character(name, hidden)
    plain = folded(text)
    spelled = spelled_together(plain)
    _check_markers(name, plain, tokenizer)
    for form in map(_without_long_runs, {plain, spelled}):
        if _ROLE_LINE.search(form) or _ROLE_TAG.search(form):
            raise InvalidValueError(
                f"the value of {name} contains a role marker ('system:' or similar): {_shown(text)}"
            )
    _check_no_erratum(name, text, template)
    for other in names:
        parts = _parts_of(other)
        if parts and (parts[0] in plain or parts[0] in spelled) and other != name:  # few are: there may be many names
            _check_other(name, text, (plain, spelled), other)


def check_text(name: str, text: str, kind: FieldType, tokenizer: Any, template: str, names: Iterable[str] = ()) -> None:
    """Check a field's value, as it stands in the text, by the field's type `kind`. Other arguments: see `check_value`.

    Raises:
        InvalidValueError: the guard refuses the value, or the value contains a special token that this tokenizer cannot
            write as plain text, or private-use characters that this package uses as marks.
    """
    if kind.guarded:
        readable = kind.readable(text)
        check_value(name, readable, tokenizer, template, names, lines=kind.kind is not FieldKind.TEXT)
    for character in text:
        if "\ue000" <= character <= "\ue00f":
            raise InvalidValueError(f"the value of {name} contains the private-use character U+{ord(character):04X}")
    if tokenizer is not None:
        from programmable_kv.prompt.tokens import encode  # needs numpy, which a gateway does not have

        encode(tokenizer, text, [Span(0, len(text))])


def _without_long_runs(text: str) -> str:
    """The text with long runs of signs and blanks shortened: repeated signs are dropped, and only a run's ends stay.

    The patterns that look for a role after such a run take time quadratic in its length.
    """
    return _LONG_RUN.sub(lambda run: _shortened(_REPEATED.sub(r"\1", run.group())), text)


def _shortened(run: str) -> str:
    return run if len(run) <= _LONGEST_RUN else run[: _LONGEST_RUN // 2] + run[-_LONGEST_RUN // 2 :]


def _refuse_character(name: str, character: str) -> None:
    if character in "\n\r":
        raise InvalidValueError(
            f"the value of {name} contains a line break (U+{ord(character):04X}), but this field takes one line. Declare it "
            'as Field(value, kind="block") if it may have several.'
        )
    what = "a control character" if ord(character) < 0xA0 else "an invisible character"
    raise InvalidValueError(f"the value of {name} contains {what} (U+{ord(character):04X}). Remove it.")


def _check_markers(name: str, plain: str, tokenizer: Any) -> None:
    squeezed = _SQUEEZED.sub(r"\1", plain)
    for form in (plain, squeezed):
        for match in _MARKED.finditer(form):
            if match.group(1) is None or not _HARMLESS.fullmatch(match.group(1)):
                _refuse_marker(name, match.group())
        match_ = next((m for m in _MARKERS.finditer(form) if form is plain or len(m.group()) > 4), None)
        if match_ is not None:
            _refuse_marker(name, match_.group())
    if tokenizer is None or not any(bracket in plain for bracket in "<[{|"):
        return
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values():
        own = folded(token.content)
        if len(own.strip()) > 2 and own in plain and token.content in template:
            _refuse_marker(name, token.content)


def _refuse_marker(name: str, marker: str) -> None:
    raise InvalidValueError(
        f"the value of {name} contains {marker!r}, which chat formats use to mark roles, turns or tools. Remove it."
    )


def _check_no_erratum(name: str, text: str, template: str) -> None:
    """Refuse a value with the words that make an erratum recognisable: those before the field's name, `[STATE UPDATE]`.

    The words between name and value (`is now`) say nothing without a field's name, and `_check_other` looks for names.
    """
    head, _, rest = template.partition("{name}")
    if "{value}" in head:
        head, rest = rest, head
    mark, linking = words_of(head), words_of(rest.partition("{value}")[0])
    said = words_of(text)
    letters, squeezed = mark.replace(" ", ""), said.replace(" ", "")
    if len(letters) < 5:
        return
    told = f" {mark} " in f" {said} " or (len(letters) >= 10 and letters in squeezed)
    if linking:
        told = told and (" " in mark or f" {linking} " in f" {said} ")
    elif " " not in mark:
        told = folded(head).replace(" ", "") in folded(text).replace(" ", "")  # one word: with the signs around it
    if told:
        raise InvalidValueError(
            f"the value of {name} contains words of the erratum template ('{head.strip()}'), so it could be read as an "
            "update of another field. Rephrase it."
        )


def _check_other(name: str, text: str, forms: tuple[str, str], other: str) -> None:
    """Refuse a value that says what another field's value is. A value may mention another field."""
    parts = _parts_of(other)
    if not any(all(part in form for part in parts) for form in forms):
        return
    called = r"[\W_]*".join(map(re.escape, parts))
    own = r"[\W_]*".join(map(re.escape, _parts_of(name)))
    for form in set(forms):
        form = re.sub(rf"(?<![^\W_]){own}(?![^\W_])", "\ue00f", form) if called in own and own != called else form
        if _tells(called).search(form):
            raise InvalidValueError(
                f"the value of {name} states a value of the field {other}, so it could be read as an update: {_shown(text)}. "
                "Rephrase it, or rename that field; Field(value, trusted=True) accepts the value unchecked."
            )


@lru_cache(maxsize=_NAMES)
def _parts_of(name: str) -> tuple[str, ...]:
    return tuple(words_of(name).split())


@lru_cache(maxsize=_NAMES)
def _tells(called: str) -> re.Pattern[str]:
    """Matches, in folded text, a statement about a field; `called` is a pattern for the field's name."""
    it = rf"(?<![^\W_]){called}(?![^\W_])[\"'`*)\]]*"
    return re.compile(
        rf"{it}\s*{_SIGN}"
        rf"|{it}\s+(?:(?:value|field|status|level|itself|also|just|here|then)\s+)?{_VERB}\b"
        rf"|{_CHANGE}\s+(?:[\w']+\s+){{0,3}}?{it}\s+(?:to|as|into)\s+\S"
        rf"|{it}['’]s\s+now\b"
        rf"|{_CHANGE}\s+(?:[\w']+\s+){{0,3}}?to\s+(?:the\s+)?{it}\s+\w"
        rf"|(?:^|[.;!?,:]\s+){it}\s+to\s+\w+\W*$"
        rf"|{_GIVE}\s+(?:[\w']+\s+){{0,3}}?{it}\s+\w"
        rf"|(?:^|[.;!?,:]\s+|\n\W*){it}\s+[-–—]+\s*\w"
        rf"|\w+\s+is\s+(?:now\s+)?the\s+(?:new\s+|right\s+|real\s+|true\s+|current\s+)?{it}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:119] + "…")
