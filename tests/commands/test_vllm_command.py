"""`pkv vllm`: export a model, certify a store for it, and keep an opening there, as in docs/vllm.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import tiny, tokenizer
from programmable_kv import SkillStore, load_model
from programmable_kv.__main__ import main
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.certificate import certificate_of


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pkv", "vllm", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, words


def test_a_model_is_exported_certified_and_given_an_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder, store = tmp_path / "source", tmp_path / "served", tmp_path / "store"
    tiny().engine.model.save_pretrained(source)
    tokenizer("byte-level").save_pretrained(source)
    run(monkeypatch, "export", str(source), str(folder), "--dtype", "float32")
    run(monkeypatch, "certify", str(folder), "--store", str(store))
    assert "is certified for" in capsys.readouterr().out
    assert certificate_of(blobs_at(store), folder, "float32").fingerprint == load_model(folder).fingerprint

    text = tmp_path / "opening.md"
    text.write_text("You are the support agent.\n", encoding="utf-8")
    run(monkeypatch, "opening", str(text), "--model", str(folder), "--store", str(store))
    entry = SkillStore(store).entry("opening")
    assert entry.key in capsys.readouterr().out
    assert entry.unit.text.endswith("You are the support agent.\n")
    assert "<|im_start|>system" in entry.unit.text
