"""What a training process must set up before DeepSpeed is imported, on machines without a GPU above all."""

import ctypes
import os
import platform
import socket

import torch


def prepare_process(use_deepspeed: bool) -> None:
    """
    Set threads, and make DeepSpeed usable on a CPU and without a launcher. Call before importing DeepSpeed.

    The processes of one machine share its cores, unless OMP_NUM_THREADS says otherwise.

    Args:
        use_deepspeed: whether this run has a DeepSpeed section.
    """
    if torch.cuda.device_count() == 0:  # else activations are on the device
        _keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _available_cores() // _processes_on_this_machine()))
    if not use_deepspeed:
        return
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Else init_distributed compiles this op for half a minute, or waits for ever on a stale build lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _keep_freed_memory() -> None:
    """
    Have glibc reuse the memory of large tensors instead of returning it to the system after each use.

    Every step frees and allocates the same activations; returned memory comes back as one page fault every 4 kB, which
    cost a tenth to a quarter of the step time of the quickstart.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def world_size() -> int:
    """Number of processes of this run, from the launcher's environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is rank 0, from the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes_on_this_machine() -> int:
    # The DeepSpeed launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
