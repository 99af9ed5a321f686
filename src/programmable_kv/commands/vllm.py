"""`pkv vllm`: the one-time steps that prepare a store and a model for skills inside vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from programmable_kv.commands.common import ModelOption, out, read_text

app = typer.Typer(
    help="Skills inside vLLM: what its plugin needs (docs/vllm.md).", no_args_is_help=True, rich_markup_mode=None
)

FolderArgument = Annotated[str, typer.Argument(help="the folder that vLLM serves; or 'embedded'")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="the skill store: a folder or any fsspec URL; a per-user folder by default"),
]
DtypeOption = Annotated[str, typer.Option(help="the dtype that vLLM serves it in (--dtype)")]


@app.command("certify")
def vllm_certify(folder: FolderArgument, store: StoreOption = None, dtype: DtypeOption = "float32") -> None:
    """Prove that a model's keys can be relocated, and certify a skill store for that model.

    Only then are the store's skills loaded into vLLM.
    """
    from programmable_kv.models.home import home
    from programmable_kv.models.source import find_source
    from programmable_kv.storage.files import blobs_at
    from programmable_kv.vllm_plugin.prepare import certify

    blobs = blobs_at(store if store is not None else home() / "skills")
    _, certificate = certify(folder, blobs, dtype=dtype)
    out.print(
        f"{blobs.where} is certified for {folder} in {certificate.dtype} (fingerprint {certificate.fingerprint[:8]}, "
        f"{len(certificate.layers)} layers). Serve {find_source(folder).place}.",
        soft_wrap=True,
    )


@app.command("opening")
def vllm_opening(
    text: Annotated[
        Path, typer.Argument(help="a text file: the beginning of the system message, up to the first skill")
    ],
    name: Annotated[str, typer.Option(help="its name")] = "opening",
    role: Annotated[str, typer.Option(help="the role of the message that it begins")] = "system",
    model: ModelOption = "embedded",
    store: StoreOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Keep the beginning of a conversation in the store, like a skill.

    vLLM can then load a prompt from its first token on.
    """
    from programmable_kv import SkillStore, load_model
    from programmable_kv.vllm_plugin.prepare import compile_opening

    loaded = load_model(model, dtype=dtype)
    entry = SkillStore(store).put(compile_opening(loaded, [(role, read_text(text))], name=name), model_name=loaded.name)
    out.print(f"{entry.key}  {name}  {len(entry.unit.ids)} tokens", soft_wrap=True)


@app.command("export")
def vllm_export(
    model: Annotated[str, typer.Argument(help="a .gguf file, a Hub id or a folder")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    dtype: Annotated[str, typer.Option(help="the dtype of the written weights")] = "bfloat16",
) -> None:
    """Write a model to a folder that vLLM can serve. A GGUF file is dequantised."""
    from programmable_kv.vllm_plugin.prepare import export

    out.print(f"{export(model, folder, dtype=dtype)}", soft_wrap=True)
