"""Processes in which Triton's kernels are interpreted on the CPU or compiled without a GPU, one each for all tests."""

from collections.abc import Iterator

import pytest

from tests.unit.ops.triton_worker import Worker, triton_worker


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Worker]:
    with triton_worker(TRITON_INTERPRET="1") as run:
        yield run


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with triton_worker(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as run:
        yield run
