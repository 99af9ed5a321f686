"""Finds where a model is loaded from before anything heavy is imported, so that a mistyped name fails at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from programmable_kv.errors import InvalidArgumentError, ModelUnavailableError
from programmable_kv.extras import require_extra
from programmable_kv.models.names import EMBEDDED, EMBEDDED_PLAIN

_GGUF_MAGIC = b"GGUF"
_REACHED_WITHIN_SECONDS = 3.0
_FORMS = (
    "Give 'embedded', 'embedded-plain', a Hub id such as 'owner/name', a folder with config.json and weights, or the path of "
    "a .gguf file."
)


@dataclass(frozen=True, slots=True)
class Source:
    """What to pass to transformers' `from_pretrained`."""

    place: str
    """a local folder or a Hub id"""
    folder: Path | None
    """the local folder; None for a Hub id"""
    gguf_file: str | None = None
    """the name of a GGUF file in the folder"""


def find_source(name: str | Path, *, revision: str | None = None) -> Source:
    """Resolve a name: an embedded model (fetched on first use), a folder, a GGUF file, or a Hub id.

    Raises:
        InvalidArgumentError: the name is not a string or a path, or is empty.
        ModelUnavailableError: nothing has that name; the message says what to do. An unreachable Hub is detected within
            seconds.
        MissingExtraError: a GGUF file or the embedded model needs the `[embedded]` extra.
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise InvalidArgumentError(f"a model's name must be a string or a path; got {name!r}. {_FORMS}")
    if str(name) in (EMBEDDED, EMBEDDED_PLAIN):
        from programmable_kv.models.fetch import embedded_folder

        folder = embedded_folder(str(name))
        return Source(str(folder), folder)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        raise ModelUnavailableError(f"{path} is a file, but not a .gguf file. {_FORMS}")
    if isinstance(name, Path) or _spelled_as_a_path(str(name)):
        raise ModelUnavailableError(f"could not load '{name}': the folder does not exist. {_FORMS}")
    return _on_the_hub(str(name), revision)


def _gguf(path: Path) -> Source:
    if not path.is_file():
        raise ModelUnavailableError(f"there is no GGUF file at {path}. Check the path.")
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise ModelUnavailableError(
            f"{path} is not a GGUF file: it begins with {magic!r} instead of {_GGUF_MAGIC!r}. Download it again."
        )
    require_extra("embedded", "gguf", "accelerate")  # transformers reads GGUF files with both
    return Source(str(path.parent), path.parent, path.name)


def _folder(path: Path) -> Source:
    if not (path / "config.json").is_file():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if files:
            raise ModelUnavailableError(
                f"{path} contains a GGUF file but no config.json. Pass the file itself: load_model('{files[0]}')."
            )
        raise ModelUnavailableError(f"could not load '{path}': the folder has no config.json. {_FORMS}")
    return Source(str(path), path)


def _spelled_as_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _on_the_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelUnavailableError(
            f"could not load '{name}': this is neither a Hub id nor an existing folder. {_FORMS}"
        ) from error
    if _hub_answers():
        return Source(name, None)
    if isinstance(cached, str):  # as a folder, because for a Hub id transformers always asks the Hub for some files
        return Source(str(Path(cached).parent), Path(cached).parent)
    raise ModelUnavailableError(
        f"could not load '{name}': the folder does not exist, the Hub cannot be reached, and the local Hub cache does "
        f"not contain the model. Check the spelling and the network. {_FORMS}"
    )


def _hub_answers() -> bool:
    """Whether the Hub answers at all. Its own client would retry each of several files for half a minute."""
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=_REACHED_WITHIN_SECONDS)
        except Exception:  # the client's error classes differ between versions; any of them means no answer
            return
        answered.set()

    # The client's timeout does not apply to the lookup of the host's name, so the wait is bounded here.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_REACHED_WITHIN_SECONDS + 1)
    return answered.is_set()
