"""Processes in which Triton's kernels are interpreted on the CPU or compiled without a GPU, one each for all tests."""

import importlib.metadata
from collections.abc import Iterator

import pytest

from tests.unit.ops.triton_worker import Worker, triton_worker


def release(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Worker]:
    pytest.importorskip("numpy")
    if release("triton") < (3, 9) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.9 breaks with numpy 2.4: install triton>=3.9 or numpy<2.4")
    with triton_worker(TRITON_INTERPRET="1") as run:
        yield run


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with triton_worker(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as run:
        yield run
