"""The compiled kernels: built once, whole or not at all, and never in the way."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from modmoe.ops import backend, build, stickbreaking_attention

# Stands in for a compiler: says what it was called with, and copies the arguments to the file after -o.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
previous=
for argument in "$@"; do
    if [ "$previous" = -o ]; then sleep 0.2; echo "$@" > "$argument"; fi
    previous=$argument
done
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and a fresh memory of what was built."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    memories = (build.library_problem, build._native)
    for memory in memories:
        memory.cache_clear()
    yield tmp_path / "cache"
    for memory in memories:
        memory.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Log of the calls of a compiler that needs no time."""
    script, log = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(COMPILER.format(log=log))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def builds(log: Path) -> float:
    sources = list(build.source_directory("cpu").glob("*.cpp"))
    return sum(" -c " in line for line in log.read_text().splitlines()) / len(sources)


def test_built_once(cache: Path, compiler: Path) -> None:
    paths = {build.library("cpu") for _ in range(3)}
    assert list(cache.iterdir()) == list(paths)
    assert builds(compiler) == 1


def test_builders_that_race(cache: Path, compiler: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(build.library, ["cpu"] * 4))
    assert list(cache.iterdir()) == list(paths)
    assert build._is_whole(next(iter(paths)))


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: b"", lambda x: b"x" + x], ids=["cut", "empty", "more"])
def test_a_damaged_library_is_built_again(cache: Path, compiler: Path, damage: Callable[[bytes], bytes]) -> None:
    path = build.library("cpu")
    path.write_bytes(damage(path.read_bytes()))
    assert not build._is_whole(path)
    assert build.library("cpu") == path
    assert build._is_whole(path)
    assert builds(compiler) == 2


def test_changed_sources_make_another_library(
    cache: Path, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.library("cpu")
    copy = tmp_path / "csrc"
    shutil.copytree(build.source_directory("cpu"), copy)
    monkeypatch.setattr(build, "source_directory", lambda kind: copy)
    with (copy / "simd.h").open("a") as file:
        file.write("// changed\n")
    assert build.library("cpu") != before


@pytest.mark.parametrize("flags", ["-march=other", "-mcpu=other"])
def test_another_processor_makes_another_library(
    cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    before = build.library("cpu")
    monkeypatch.setattr(build, "_processor", lambda: flags)
    assert build.library("cpu") != before


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library_problem("cpu") == "CXX='no-such-compiler' is not a program"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    build.library_problem.cache_clear()
    assert build.library_problem("cpu") == "there is no C++ compiler: install g++ or set CXX"


def test_a_compiler_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-shared*|*" -c "*) echo "x.cpp:1: error: no luck" >&2; exit 3;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert build.library_problem("cpu") == "compiler failed with exit status 3 (x.cpp:1: error: no luck)"
    assert list(cache.iterdir()) == []


def test_a_compiler_that_is_no_program(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_bytes(b"\x7fELF but not really")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert build.library_problem("cpu") == "compiler cannot be started (Exec format error)"


def test_a_cache_that_cannot_be_written(compiler: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")
    problem = build.library_problem("cpu")
    assert problem is not None
    assert problem.startswith(f"the cache {cache} cannot be written (")
    assert problem.endswith("; set MODMOE_CACHE to another folder")


def test_a_library_that_does_not_load(cache: Path, compiler: Path) -> None:
    problem = build.library_problem("cpu")  # the stand-in does not write real libraries
    assert problem is not None
    assert problem.startswith("the cpu kernels were built but do not load (")


def test_no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "modmoe" / "ops" / "build.py"))
    with pytest.raises(build.BuildError, match=r"there is no csrc/cpu in .*: install modmoe again"):
        build.source_directory("cpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_torch_without_cuda() -> None:
    assert build.library_problem("cuda") == "this torch is built without CUDA"


def test_auto_goes_on_without_kernels_and_says_why_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(backend, "_announced", set())
    x = torch.randn(1, 1, 4, 8)
    with caplog.at_level(logging.INFO, logger="modmoe"):
        out = [stickbreaking_attention(x, x, x)[0] for _ in range(3)]
    torch.testing.assert_close(out[2], stickbreaking_attention(x, x, x, backend="reference")[0])
    said = [record.getMessage() for record in caplog.records if "'cpp'" in record.getMessage()]
    assert len(said) == 1
    assert "runs on backend 'torch' (auto" in said[0]
    assert "not 'cpp': CXX='no-such-compiler' is not a program" in said[0]
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot be used: CXX='no-such-compiler' is not a program"):
        stickbreaking_attention(x, x, x, backend="cpp")


@pytest.mark.slow
def test_real_build_from_two_processes(cache: Path) -> None:
    code = "import torch; from modmoe.ops.build import library_problem; assert library_problem('cpu') is None"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    assert len(list(cache.iterdir())) == 1
