"""`docs/reference.md`: every public name with its signature and docstring, from the code."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

_PACKAGE = "programmable_kv"
HEAD = """# API reference

Generated from the code by `python -m scripts.write_docs`; a test fails when it is out of date. Every name is imported from
`programmable_kv`. [The API](api.md) is the overview.

Shapes: B batch, H key-value heads, S slots, T new tokens, D head dim, R rotary dim, L layers.
"""
_HEADINGS = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}


def reference_page() -> str:
    """Return the page, with one section for each name: classes and functions first, errors last."""
    public = dict(public_names())
    errors = {name: each for name, each in public.items() if inspect.isclass(each) and issubclass(each, Exception)}
    others = {name: each for name, each in public.items() if name not in errors}
    listed = ", ".join(f"[`{name}`](#{name.lower()})" for name in [*others, *errors])
    sections = [section(name, each) for name, each in [*others.items(), *errors.items()]]
    return "\n".join([HEAD, f"{listed}\n", *sections])


def public_names() -> Iterator[tuple[str, Any]]:
    """Yield the names in `programmable_kv.__all__`, sorted, with their objects. Dunder names are left out."""
    import programmable_kv

    for name in sorted(programmable_kv.__all__, key=str.lower):
        if not name.startswith("__"):
            yield name, getattr(programmable_kv, name)


def section(name: str, thing: Any, package: str = _PACKAGE) -> str:
    """Return a name's heading, signature and docstring, and for a class its public members.

    Members of base classes in `package` are included.
    """
    parts = [f"## {name}"]
    if not inspect.isclass(thing):
        signed = _signature(name, thing) if callable(thing) else name
        return "\n\n".join([*parts, f"```python\n{signed}\n```", markdown(inspect.getdoc(thing) or "")]).rstrip() + "\n"
    bases = [base.__name__ for base in thing.__bases__ if base.__module__.startswith(package)]
    if issubclass(thing, enum.Enum):
        parts += [_text(thing), *_enum_members(thing)]
    elif issubclass(thing, Exception):
        parts += [f"Base: `{bases[0]}`." if bases else "Base: `Exception`.", _text(thing)]
    else:
        signed = f"class {name}" if thing.__init__ is object.__init__ else f"class {_signature(name, thing)}"
        parts += [f"```python\n{signed}\n```", _text(thing)]
        own = [base for base in thing.__mro__ if base.__module__.startswith(package)]
        if any("__init__" in vars(base) for base in own) and not is_dataclass(thing):
            parts.append(markdown(inspect.getdoc(thing.__init__) or ""))
        if is_dataclass(thing):
            parts.append(_attributes(thing, package))
        parts += [_member(name, *member) for member in _members(thing, package)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(docstring: str) -> str:
    """Return a docstring with its `Args:`, `Returns:`, `Yields:` and `Raises:` blocks in Markdown."""
    found: list[str] = []
    for paragraph in docstring.split("\n\n"):
        head, _, body = paragraph.partition("\n")
        title = _HEADINGS.get(head.removesuffix(":")) if head.endswith(":") else None
        if title is None:
            found.append(paragraph)
        else:
            found.append(f"{title}:\n\n{_items(textwrap.dedent(body), named=title in ('Arguments', 'Raises'))}")
    return "\n\n".join(found).strip()


def _items(body: str, *, named: bool) -> str:
    """Format the entries of a block. Each entry begins at the margin and may continue on indented lines."""
    entries: list[str] = []
    for line in body.splitlines():
        if line.startswith((" ", "\t")) and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    if not named:
        return " ".join(entries)
    marked = []
    for entry in entries:
        names, colon, text = entry.partition(": ")
        # Only plain names count, so that a sentence with a colon in it is not taken for one.
        plain = re.fullmatch(r"[\w*]+(, [\w*]+)*", names) is not None
        quoted = ", ".join(f"`{each}`" for each in names.split(", "))
        marked.append(f"- {quoted}: {text}" if colon and plain else f"- {entry}")
    return "\n".join(marked)


def _text(thing: type) -> str:
    """Return a class's own docstring. The one that `dataclass` generates is only a signature and is left out."""
    text = inspect.getdoc(thing) or ""
    return "" if text.startswith(f"{thing.__name__}(") else markdown(text)


def _members(thing: type, package: str) -> Iterator[tuple[str, Any]]:
    """Yield public methods and properties in the order of their definition. Members of base classes come first."""
    known = {each.name for each in fields(thing)} if is_dataclass(thing) else set()
    seen: set[str] = set()
    for cls in reversed([base for base in thing.__mro__ if base.__module__.startswith(package)]):
        for name in vars(cls):
            member = inspect.getattr_static(thing, name)
            shown = isinstance(member, property | cached_property | classmethod | staticmethod) or inspect.isfunction(
                member
            )
            if shown and not name.startswith("_") and name not in known | seen:
                seen.add(name)
                yield name, member


def _member(owner: str, name: str, member: Any) -> str:
    if isinstance(member, property | cached_property):
        getter = member.func if isinstance(member, cached_property) else member.fget
        returns = getter.__annotations__.get("return", "") if getter else ""
        signed = f"{name}: {_annotation(returns)}" if returns else name
    else:
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        signed = _signature(name, function, skip_first=not isinstance(member, staticmethod))
        signed = f"@classmethod\n{signed}" if isinstance(member, classmethod) else signed
        member = function
    return f"### {owner}.{name}\n\n```python\n{signed}\n```\n\n{markdown(inspect.getdoc(member) or '')}".rstrip()


def _attributes(thing: Any, package: str) -> str:
    """Return the list of a dataclass's fields, with the strings that document them."""
    texts: dict[str, str] = {}
    for cls in reversed(thing.__mro__):
        if cls.__module__.startswith(package):
            texts |= _strings_after_names(cls)
    rows = [
        f"- `{each.name}`" + (f": {' '.join(texts[each.name].split())}" if each.name in texts else "")
        for each in fields(thing)
        if not each.name.startswith("_")
    ]
    return "Attributes:\n\n" + "\n".join(rows) if rows else ""


def _enum_members(thing: type[enum.Enum]) -> list[str]:
    texts = _strings_after_names(thing)
    rows = [
        f"- `{each.name}` = `{each.value!r}`"
        + (f": {' '.join(texts[each.name].split())}" if each.name in texts else "")
        for each in thing
    ]
    return ["\n".join(rows)]


def _strings_after_names(thing: type) -> dict[str, str]:
    """Return name -> attribute docstring: the string literal that follows the name's assignment in a class body."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except OSError:
        return {}
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        targets = (
            [statement.target] if isinstance(statement, ast.AnnAssign)
            else statement.targets if isinstance(statement, ast.Assign)
            else []
        )  # fmt: skip
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = following.value.value
            if isinstance(text, str):
                found |= {target.id: text for target in targets if isinstance(target, ast.Name)}
    return found


def _signature(name: str, thing: Any, *, skip_first: bool = False) -> str:
    """Return a signature in Python syntax, on one line if it fits into 100 columns."""
    signature = inspect.signature(thing)
    parameters = list(signature.parameters.values())[1 if skip_first else 0 :]
    parts: list[str] = []
    star = False
    for index, each in enumerate(parameters):
        if each.kind is each.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star = star or each.kind is each.VAR_POSITIONAL
        parts.append(_parameter(each))
        following = parameters[index + 1] if index + 1 < len(parameters) else None
        if each.kind is each.POSITIONAL_ONLY and (following is None or following.kind is not each.POSITIONAL_ONLY):
            parts.append("/")
    returns = (
        "" if signature.return_annotation is signature.empty else f" -> {_annotation(signature.return_annotation)}"
    )
    returns = "" if inspect.isclass(thing) else returns
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return line
    return f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def _parameter(each: inspect.Parameter) -> str:
    stars = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
    text = stars + each.name
    if each.annotation is not each.empty:
        text += f": {_annotation(each.annotation)}"
    if each.default is not each.empty:
        text += f" = {_default(each.default)}" if each.annotation is not each.empty else f"={_default(each.default)}"
    return text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else str(getattr(annotation, "__name__", annotation))


def _default(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    text = repr(value)
    # An address differs from run to run; a default factory shows as `<factory>`.
    return "..." if text.startswith("<") else text
