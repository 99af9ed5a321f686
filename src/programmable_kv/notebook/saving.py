"""`Notebook.save`, `Notebook.load` and pickling: what is written of a notebook, and how it is read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from programmable_kv.design.build import Build
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.ranking import Ranking
from programmable_kv.models.load import Model
from programmable_kv.models.loaded import loaded_model
from programmable_kv.notebook.state import State
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.storage.files import Blobs
from programmable_kv.storage.memory import MemoryBlobs
from programmable_kv.storage.notebooks import SavedNotebook, read, write

if TYPE_CHECKING:
    from pathlib import Path

    from programmable_kv.notebook.notebook import Notebook


def save(notebook: Notebook, where: str | Path | Blobs) -> Path | str:
    """Carry out `Notebook.save`, without the account. Replaced values and turns that were cut are not written."""
    state, conversation = notebook._ready(), notebook._state.conversation
    written = {name: value.written for name, value in state.context.fields.items()}
    values = {name: written.get(name, value) for name, value in conversation.values.items()} if conversation else {}
    messages = conversation.still_in(state.context.text, values) if conversation else ()
    saved = SavedNotebook(
        notebook.erratum_template, messages, notebook.prompt.template, values,
        state.context, state.ledger, notebook.cache.tensors(), notebook._declared,
    )  # fmt: skip
    return write(saved, where, notebook.model)


def load(kind: type[Notebook], where: str | Path | Blobs, model: Model) -> Notebook:
    """Carry out `Notebook.load`, without the account."""
    saved = read(where, model)
    way = Visibility.DESIGN if isinstance(saved.ledger, Build) else Visibility.CAUSAL
    notebook = kind(model, erratum_template=saved.erratum_template, visibility=way)
    notebook.prompt.template = saved.template
    buffer = model.engine.new_buffer(len(saved.context))
    buffer.load_tensors(dict(saved.tensors))
    conversation = Conversation(saved.template, saved.messages, saved.values) if saved.messages else None
    notebook._state, notebook._buffer = State(saved.context, saved.ledger, conversation), buffer
    notebook._declared = saved.declared
    return notebook


def pickled(notebook: Notebook) -> tuple[object, ...]:
    """What `Notebook.__reduce__` returns: the notebook saved to memory, and what identifies its model."""
    blobs = MemoryBlobs()
    save(notebook, blobs)
    return unpickled, (
        type(notebook),
        blobs.contents,
        notebook.model.fingerprint,
        notebook.model.name,
        notebook.ranking,
    )


def unpickled(
    kind: type[Notebook], contents: dict[str, bytes], fingerprint: str, name: str, ranking: Ranking
) -> Notebook:
    """Read a pickled notebook back. Its model must be loaded in this process.

    Raises:
        ModelUnavailableError: the model is not loaded in this process.
        CorruptFileError: the contents are damaged.
    """
    notebook = load(kind, MemoryBlobs(contents), loaded_model(fingerprint, Model, name))
    notebook.ranking = ranking
    return notebook
