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

from modmoe.ops import backend, build, routing_cuda, stickbreaking_attention

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


def test_another_processor_makes_another_library(cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library("cpu")
    monkeypatch.setattr(build, "_processor", lambda: "x86_64 flags: fpu")
    assert build.library("cpu") != before


def test_another_torch_makes_another_library(cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upgraded in place: all paths are the same, and what they lead to is not."""
    before = build.library("cpu")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert build.library("cpu") != before


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library_problem("cpu") == "CXX='no-such-compiler' is not a program"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    build.library_problem.cache_clear()
    assert build.library_problem("cpu") == "there is no C++ compiler: install g++ or set CXX"


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ('echo "x.cpp:1: error: no luck" >&2; exit 3', "failed with exit status 3 (x.cpp:1: error: no luck)"),
        (r"""printf 'fran\347ais.cpp: error\n' >&2; exit 1""", "failed with exit status 1 (fran\ufffdais.cpp: error)"),
        ("kill -9 $$", "was killed by signal 9; is there enough memory?"),
    ],
    ids=["error", "not UTF-8", "killed"],
)
def test_a_compiler_that_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, problem: str
) -> None:
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*|*" -c "*) {end};; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert build.library_problem("cpu") == f"compiler {problem}"
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


def test_a_user_without_a_home(compiler: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (build.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 5)
    assert build.library_problem("cpu") == (
        "there is no home folder for ~/.cache/modmoe: set MODMOE_CACHE to a folder"
    )


def test_a_library_that_does_not_load(cache: Path, compiler: Path) -> None:
    problem = build.library_problem("cpu")  # the stand-in does not write real libraries
    assert problem is not None
    assert problem.startswith("the cpu kernels were built but do not load (")
    assert "invalid ELF header" in problem or "file too short" in problem


def test_no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "modmoe" / "ops" / "build.py"))
    with pytest.raises(build.BuildError, match=r"there is no csrc/cpu in .*: install modmoe again"):
        build.source_directory("cpu")


def test_torch_without_cuda(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build.library_problem("cuda") == "this torch is built without CUDA"


def test_cards_that_are_too_old_or_too_new_are_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would compile for them, and a card beside them would have no kernels either."""
    cards = [(7, 5), (8, 6), (9, 0), (12, 0)]
    listed = "compute_75\ncompute_80\ncompute_86\ncompute_90\n"
    monkeypatch.setattr(build, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_run", lambda command: listed if "--list-gpu-arch" in command else "")
    monkeypatch.delenv(build.ARCHS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
    assert build.cuda_archs() == ("80", "86", "90a")


def test_cuda_without_its_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(cache))
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    problem = "there is no nvcc: install the CUDA toolkit or set CUDA_HOME"
    assert build.library_problem("cuda") == problem
    assert routing_cuda.device_problem(torch.device("cuda", 0)) == problem


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
