"""Building the C++ kernels at set-up, and finding them at run time."""

import shutil
from pathlib import Path

import pytest
import torch

from nanogpt.engine.cpu import build, library

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for a library that has not been built yet."""
    target = tmp_path / "build" / "kernels_test.so"
    monkeypatch.setattr(build, "library_path", lambda: target)
    monkeypatch.setattr(library, "library_path", lambda: target)
    return target


def test_without_a_compiler_it_says_so(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    build.main()
    out = capsys.readouterr().out
    assert out.startswith("CPU kernels: not built, there is no no-such-compiler")
    assert out.count("\n") == 1
    assert not elsewhere.exists()


@needs_compiler
def test_the_compiler_is_quoted_when_it_fails(
    elsewhere: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("#error this is not the kernel\n")
    monkeypatch.setattr(build, "SOURCES", [broken])
    build.main()
    captured = capsys.readouterr()
    assert "this is not the kernel" in captured.out + captured.err
    assert "CPU kernels: not built" in captured.out.splitlines()[-1]
    assert not elsewhere.exists()
    assert list(elsewhere.parent.iterdir()) == []


def test_what_is_built_is_not_built_again(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere.parent.mkdir()
    elsewhere.touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.main()
    assert capsys.readouterr().out == "CPU kernels: kernels_test.so is ready\n"


def test_a_library_belongs_to_one_source_one_torch_and_one_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "attention.cpp"
    source.write_text("int a;")
    monkeypatch.setattr(library, "SOURCES", [source])
    paths = {library.library_path()}
    source.write_text("int b;")
    paths.add(library.library_path())
    monkeypatch.setattr(library, "_cpu_features", lambda: "flags: sse2")
    paths.add(library.library_path())
    monkeypatch.setattr(torch, "__version__", "2.99")
    paths.add(library.library_path())
    assert len(paths) == 4
