"""What a rank says about itself, and what tells how many ranks were meant."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

PACKAGES = ("modmoe", "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors")
_SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """Where a process is in its launch, from the launcher's environment; without a launcher a world of one."""

    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    address: str
    port: int
    host: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
        return cls(
            rank=int(environment.get("RANK", 0)),
            world_size=int(environment.get("WORLD_SIZE", 1)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            # The DeepSpeed launcher says CROSS_RANK, torchrun GROUP_RANK.
            node_rank=int(environment.get("CROSS_RANK") or environment.get("GROUP_RANK") or 0),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", 0)),
            host=socket.gethostname(),
        )

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Facts:
    """
    One rank's machine and software.

    Attributes:
        code: digest of the sources of the package, its kernels and train/.
        config: digest of the run's resolved configuration; empty without one.
        threads: OMP_NUM_THREADS, 0 if it is not set.
        loopback: whether gloo would listen where no other node reaches it.
        interface: the network interface that faces rank 0.
        gpus: how many this process sees.
        gpu_id: tells GPUs of one node apart; empty if none belongs to this rank.
        gpu_memory, gpu_free, shared_memory: bytes.
    """

    rank: int
    host: str
    node_rank: int
    local_rank: int
    versions: dict[str, str]
    code: str
    config: str
    cores: int
    threads: int
    open_files: int
    shared_memory: int
    interface: str
    loopback: bool
    gpus: int = 0
    gpu: str = ""
    gpu_id: str = ""
    gpu_memory: int = 0
    gpu_free: int = 0
    driver: str = ""


def gather_facts(place: Place, config: str) -> Facts:
    """
    Facts of this process.

    Args:
        place: of this process.
        config: digest of the run's configuration.
    """
    return Facts(
        rank=place.rank,
        host=place.host,
        node_rank=place.node_rank,
        local_rank=place.local_rank,
        versions=_versions(),
        code=_digest([*_package(), _ROOT / "csrc", _ROOT / "train"]),
        config=config,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=int(os.environ.get("OMP_NUM_THREADS") or 0),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0,
        interface=_interface(place.address),
        loopback="GLOO_SOCKET_IFNAME" not in os.environ and _is_loopback(place.host),
        **_gpu(place.local_rank),
    )


def _package() -> list[Path]:
    spec = importlib.util.find_spec("modmoe")
    return [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _digest(folders: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _gpu(index: int) -> dict[str, object]:
    count = torch.cuda.device_count()
    if index >= count:
        return {"gpus": count}
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "gpus": count,
        "gpu": properties.name,
        "gpu_id": str(properties.uuid),
        "gpu_memory": total,
        "gpu_free": free,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "",
    }


def _interface(address: str) -> str:
    """Name of the interface through which an address is reached; empty if there is none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))  # sends nothing
            ours = probe.getsockname()[0]
    except OSError:
        return ""
    found = [name for name, entries in psutil.net_if_addrs().items() for entry in entries if entry.address == ours]
    return found[0] if found else ""


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True


# ---- How many ranks were meant ----


@dataclass(frozen=True)
class Expectation:
    """
    What one source says about the size of the launch; None where it says nothing.

    Attributes:
        source: who says so.
        ranks: how many processes.
        nodes: how many machines.
        exact: False if more ranks are right too.
    """

    source: str
    ranks: int | None = None
    nodes: int | None = None
    exact: bool = True


def expectations(
    expect_world: int | None, environment: Mapping[str, str], launchers: Sequence[tuple[Sequence[str], Path]]
) -> list[Expectation]:
    """
    Everything that tells how large the world should be.

    Args:
        expect_world: what the user says.
        environment: of this process.
        launchers: command line and working directory of the processes above this one.
    """
    found = [] if expect_world is None else [Expectation("--expect-world", ranks=expect_world)]
    for command, directory in launchers:
        name = _hostfile_option(command)
        if name is not None:
            found.append(_read_hostfile(directory / name, command))
    if "SLURM_JOB_NUM_NODES" in environment:
        found.append(Expectation("Slurm (SLURM_JOB_NUM_NODES)", nodes=int(environment["SLURM_JOB_NUM_NODES"])))
    found = list(dict.fromkeys(found))  # several processes above may show the same command line
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if variable in environment:
            found.append(Expectation(variable, ranks=int(environment[variable]), exact=False))
    return found


def launchers_above() -> list[tuple[list[str], Path]]:
    """Command line and working directory of this process's ancestors, as far as they may be looked at."""
    found = []
    for process in psutil.Process().parents():
        try:
            found.append((process.cmdline(), Path(process.cwd())))
        except psutil.Error:
            continue
    return found


def _hostfile_option(command: Sequence[str]) -> str | None:
    if not any(Path(word).name == "deepspeed" or word == "deepspeed.launcher.runner" for word in command[:4]):
        return None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in ("-H", "--hostfile"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
    return None


def _read_hostfile(path: Path, command: Sequence[str]) -> Expectation:
    if not path.is_file():
        return Expectation(f"hostfile {path}, which does not exist")
    lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    slots = [int(word.partition("=")[2]) for line in lines for word in line if word.startswith("slots=")]
    filters = ("--include", "--exclude", "--num_nodes", "--num_gpus", "-i", "-e")
    if any(word.partition("=")[0] in filters for word in command):
        return Expectation(f"hostfile {path}")
    return Expectation(f"hostfile {path}", ranks=sum(slots), nodes=len(slots))
