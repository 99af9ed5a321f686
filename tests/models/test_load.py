"""Loading models: real files, and a typed error for each way in which a name cannot be resolved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tokenizer
from programmable_kv import (
    InvalidArgumentError,
    MissingExtraError,
    ModelUnavailableError,
    UnsupportedModelError,
    load_model,
    wrap_model,
)
from programmable_kv.cache.transformers_api import GROUPED_SDPA
from programmable_kv.models import fetch
from programmable_kv.records import read_record

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a model."""
    return saved(tmp_path / "m")


def saved(folder: Path, **changes: Any) -> Path:
    tiny_model("llama", **changes).save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    return folder


@pytest.mark.weights
@pytest.mark.parametrize("name", sorted(fetch.ADAPTERS))
def test_an_embedded_model_is_the_base_plus_its_adapter(request: pytest.FixtureRequest, name: str) -> None:
    from safetensors.torch import load_file

    embedded = request.getfixturevalue(name.replace("-", "_"))
    adapter = load_file(fetch.adapter_folder(name) / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.3.mlp.up_proj"
    delta = 2.0 * adapter[f"{layer}.lora_B.weight"].float() @ adapter[f"{layer}.lora_A.weight"].float()
    base = load_file(fetch.base_folder() / "model.safetensors")["model.layers.3.mlp.up_proj.weight"].float()
    merged = embedded.engine.model.model.layers[3].mlp.up_proj.weight
    assert float(delta.abs().max()) > 1e-3
    torch.testing.assert_close(merged, base + delta, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", sorted(fetch.ADAPTERS))
def test_an_adapter_is_small(name: str) -> None:
    folder = fetch.adapter_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000


def test_the_adapter_comes_with_its_record() -> None:
    folder = fetch.adapter_folder("embedded-plain")
    from programmable_kv.lab.adapter import training_summary

    summary = training_summary(folder)
    assert summary["step"] == len(summary["curve"])
    stages = {name for name in summary["recipe"] if name.endswith("_steps")} - {"warmup_steps", "cosine_steps"}
    assert summary["step"] == sum(summary["recipe"][name] for name in stages), "the schedule was trained to its end"
    assert {"python", "text_digest", "held_out"} <= set(summary)
    assert all(figure["n"] >= 200 for figure in summary["held_out"].values())
    recorded: Any = read_record(RESULTS / "adapter-held-out-embedded-plain.json").model_dump(mode="json")["summary"]
    assert summary["held_out"] == {kind: recorded[kind] for kind in summary["held_out"]}


def test_loaded_with_attention_that_does_not_repeat_keys(embedded: Any) -> None:
    assert embedded.engine.model.config._attn_implementation == GROUPED_SDPA
    assert embedded.dtype is torch.float32
    assert embedded.engine.relocation.exact


def test_attention_dtype_and_device_are_as_asked(folder: Path) -> None:
    for attention in ("sdpa", "eager"):
        assert load_model(folder, attention=attention).engine.model.config._attn_implementation == attention
    assert load_model(folder, dtype="auto").dtype is torch.float64, "the dtype on disk"
    assert load_model(folder, dtype="bfloat16").dtype is torch.bfloat16
    assert load_model(folder, device="cpu").engine.device == torch.device("cpu")


def test_a_device_without_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is moved after loading, because transformers cannot load onto a device without accelerate."""
    from programmable_kv.models import load

    monkeypatch.setattr(load, "find_spec", lambda name: None)
    assert load_model(folder, device="cpu").engine.device == torch.device("cpu")


@pytest.mark.weights
def test_a_gguf_file(tmp_path: Path) -> None:
    """The embedded base model's own file, loaded like any user's GGUF file. Its suffix may be in capitals."""
    file = fetch._fetch_gguf(tmp_path, lambda *_: None).rename(tmp_path / "MODEL.GGUF")
    loaded = load_model(file)
    plain = load_model(fetch.base_folder())
    ids = list(range(100, 140))
    one = loaded.engine.append(loaded.engine.new_buffer(), ids)
    two = plain.engine.append(plain.engine.new_buffer(), ids)
    assert float(torch.nn.functional.cosine_similarity(one, two)) > 0.9999


class TestWhatCannotBeLoaded:
    """Each case raises one typed error that says what to do."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.gguf", "no GGUF file at missing.gguf"),
            ("MISSING.GGUF", "no GGUF file at MISSING.GGUF"),
            ("./no-such-folder", "the folder does not exist"),
            (Path("no-such-folder"), "the folder does not exist"),
            ("a/b/c", "the folder does not exist"),
            ("not a hub id!", "neither a Hub id"),
        ],
    )
    def test_a_name_that_leads_nowhere(self, name: str | Path, message: str) -> None:
        with pytest.raises(ModelUnavailableError, match=message):
            load_model(name)

    @pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a wheel", b"<html>not found</html>"])
    def test_a_file_that_is_no_gguf(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(ModelUnavailableError, match="is not a GGUF file"):
            load_model(tmp_path / "m.gguf")

    @pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, b"GGUF\x03" + bytes(200)])
    def test_a_gguf_that_is_cut_off(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.GGUF").write_bytes(content)
        with pytest.raises(ModelUnavailableError, match="truncated"):
            load_model(tmp_path / "m.GGUF")

    def test_a_folder_with_a_gguf_only(self, tmp_path: Path) -> None:
        (tmp_path / "m.GGUF").touch()
        with pytest.raises(ModelUnavailableError, match=r"Pass the file itself: load_model\('.*m.GGUF'\)"):
            load_model(tmp_path)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelUnavailableError, match="no config"):
            load_model(tmp_path)

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").touch()
        with pytest.raises(ModelUnavailableError, match="is a file, but not"):
            load_model(tmp_path / "m.safetensors")

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_a_damaged_file(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
        with pytest.raises(ModelUnavailableError, match="could not load"):
            load_model(folder)

    def test_a_device_that_is_not_there(self, folder: Path) -> None:
        with pytest.raises(ModelUnavailableError, match=r"device 'xpu:7' cannot be used here.*Omit the device"):
            load_model(folder, device="xpu:7")
        with pytest.raises(ModelUnavailableError, match="cannot be used here"):
            load_model(folder, device="no such device")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dtype": "float99"}, "dtype must be a floating"),
            ({"dtype": torch.int8}, "dtype must be a floating"),
            ({"dtype": 32}, "dtype must be a floating"),
            ({"attention": "flash"}, "attention must be one of"),
            ({"device": 1.5}, "device must be a torch device"),
            ({"name": 5}, "a string or a path"),
            ({"name": " "}, "a string or a path"),
        ],
        ids=str,
    )
    def test_an_argument_of_the_wrong_kind(self, folder: Path, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            load_model(**{"name": folder, **arguments})

    def test_a_gguf_without_its_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'programmable-kv\[embedded\]'"):
            load_model(tmp_path / "m.gguf")

    def test_recurrent_models_are_refused_at_the_door(self) -> None:
        with pytest.raises(UnsupportedModelError, match="caches a state"):
            wrap_model(tiny_model("mamba", state_size=8, expand=2), tokenizer("byte-level"))

    def test_slow_tokenizers_are_refused(self) -> None:
        class Slow:
            is_fast = False

        with pytest.raises(ModelUnavailableError, match="fast tokenizer"):
            wrap_model(tiny_model("llama"), Slow())


def test_code_that_comes_with_a_model_runs_on_request_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelUnavailableError, match="pass trust_remote_code=True to run it"):
        load_model(folder)
    assert type(load_model(folder, trust_remote_code=True).engine.model).__name__ == "OwnModel"


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that cannot reach the Hub, with two revisions of a model in its Hub cache."""
    cache = tmp_path / "hub" / "models--me--tiny"
    for revision, commit, layers in (("main", "a" * 40, 2), ("v2", "b" * 40, 1)):
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        saved(cache / "snapshots" / commit, num_hidden_layers=layers)
    return {
        **os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "hub"), "PKV_HOME": str(tmp_path),
    }  # fmt: skip


def loaded_in_a_process(environment: dict[str, str], arguments: str) -> str:
    code = f"from programmable_kv import load_model; print(len(load_model({arguments}).engine.layout.layers))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "Retrying" not in done.stderr, "the client's own retries take half a minute for each file"
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_mistyped_name_without_a_network(hub: dict[str, str]) -> None:
    said = loaded_in_a_process(hub, "'me/tyni'")
    assert "ModelUnavailableError" in said
    assert "the Hub cannot be reached" in said


def test_a_hub_model_is_loaded_from_its_cache_without_a_network(hub: dict[str, str]) -> None:
    assert loaded_in_a_process(hub, "'me/tiny'") == "2"
    assert loaded_in_a_process(hub, "'me/tiny', revision='v2', token=False") == "1"
