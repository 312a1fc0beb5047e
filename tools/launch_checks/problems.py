"""What is wrong with a launch, one sentence each with the remedy. Pure functions of a report."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from statistics import median

from .facts import Facts
from .report import Directory, Report, size

# Seconds. File times, logs of several nodes and certificates are no use beyond.
CLOCK_SKEW = 1.0
# Share of the median speed below which a group of ranks counts as slow.
SLOW = 0.5
# NCCL and data workers keep buffers there; containers often have 64 MB.
SHARED_MEMORY = 512 * 2**20
# Share of a GPU's memory that the context of this process itself, and others' desktops, may use.
GPU_IN_USE = 0.1


def problems(report: Report) -> list[str]:
    """All sentences."""
    return [sentence for check in _CHECKS for sentence in check(report)]


def size_of_world(report: Report) -> Iterator[str]:
    ranks, nodes = len(report.facts), len(report.nodes)
    for expected in report.expectations:
        if expected.source.endswith("which does not exist"):
            yield (
                f"{expected.source}: the launcher went on with {ranks} rank(s) on this machine alone; correct the "
                "path after -H"
            )
        if expected.nodes is not None and nodes != expected.nodes:
            yield (
                f"{nodes} node(s) take part, but {expected.source} says {expected.nodes}: start one launcher per node "
                "with the same hostfile (--no_ssh --node_rank 0, 1, ...), or one `srun` task per node"
            )
        if expected.ranks is None or ranks == expected.ranks or (not expected.exact and ranks > expected.ranks):
            continue
        yield (
            f"the world has {ranks} rank(s), but {expected.source} says {expected.ranks}: start the ranks through "
            "`deepspeed` or `torchrun`, which set RANK and WORLD_SIZE, and check hostfile and --num_gpus"
        )


def same_software(report: Report) -> Iterator[str]:
    for package in report.facts[0].versions:
        yield from _differing(
            report.facts,
            lambda facts, package=package: facts.versions.get(package, "not installed"),
            package,
            "install the same version everywhere, or share one environment",
        )
    yield from _differing(
        report.facts, lambda facts: facts.code, "the code of modmoe", "copy the same sources to all nodes"
    )
    yield from _differing(
        report.facts, lambda facts: facts.config, "the run's configuration", "give all nodes the same file and options"
    )


def same_hardware(report: Report) -> Iterator[str]:
    if any(facts.gpus for facts in report.facts):
        without = [facts for facts in report.facts if not facts.gpu_id]
        if without:
            yield (
                f"{_who(without)} found no GPU of its own ({without[0].gpus} visible, local rank "
                f"{without[0].local_rank}): start as many ranks per node as it has GPUs, and check nvidia-smi there"
            )
    with_gpu = [facts for facts in report.facts if facts.gpu_id]
    shared = [key for key, count in Counter((f.node_rank, f.gpu_id) for f in with_gpu).items() if count > 1]
    for key in shared:
        ranks = [facts for facts in with_gpu if (facts.node_rank, facts.gpu_id) == key]
        yield f"{_who(ranks)} share one GPU: start one rank per GPU, and check CUDA_VISIBLE_DEVICES"
    yield from _differing(with_gpu, lambda f: f.gpu, "the GPU model", "the slowest sets the pace: use equal nodes")
    yield from _differing(
        with_gpu, lambda f: size(f.gpu_memory), "the GPU memory", "the smallest sets the limit: use equal nodes"
    )
    yield from _differing(with_gpu, lambda f: f.driver, "the NVIDIA driver", "install the same one on all nodes")


def gpu_memory_in_use(report: Report) -> Iterator[str]:
    for facts in report.facts:
        used = facts.gpu_memory - facts.gpu_free
        if used > GPU_IN_USE * facts.gpu_memory and not _shares_gpu(facts, report):
            yield (
                f"{_who([facts])}: {size(used)} of {size(facts.gpu_memory)} of its GPU are in use already: end the "
                "process that nvidia-smi shows there"
            )


def limits(report: Report) -> Iterator[str]:
    needed = max(1024, 16 * len(report.facts))
    short = [facts for facts in report.facts if facts.open_files < needed]
    if short:
        yield (
            f"{_who(short)} may open {short[0].open_files} files, and sockets to {len(report.facts)} ranks, data and "
            f"checkpoints need up to {needed}: raise the limit (ulimit -n 65536) where the launcher starts"
        )
    for ranks in report.nodes.values():
        threads, cores = ranks[0].threads * len(ranks), ranks[0].cores
        if len(ranks) > cores:
            yield (
                f"{len(ranks)} ranks on {ranks[0].host} share {cores} core(s): ask the scheduler for more "
                "(--cpus-per-task), or start fewer"
            )
        elif threads > cores:
            yield (
                f"{len(ranks)} ranks on {ranks[0].host} with OMP_NUM_THREADS={ranks[0].threads} each have {cores} "
                f"core(s): set OMP_NUM_THREADS={cores // len(ranks)}"
            )
        if ranks[0].gpu_id and len(ranks) > 1 and ranks[0].shared_memory < SHARED_MEMORY:
            yield (
                f"/dev/shm on {ranks[0].host} holds {size(ranks[0].shared_memory)}, too little for NCCL and data "
                "workers: start the container with --shm-size=8g or --ipc=host"
            )


def network(report: Report) -> Iterator[str]:
    hidden = [facts for facts in report.facts if facts.loopback]
    if len(report.nodes) > 1 and hidden:
        yield (
            f"the host name of {_who(hidden)} is a loopback address, where gloo waits for other nodes in vain: set "
            f"GLOO_SOCKET_IFNAME={hidden[0].interface or '<interface>'} (and NCCL_SOCKET_IFNAME)"
        )


def collectives(report: Report) -> Iterator[str]:
    for name, ranks in report.wrong.items():
        yield (
            f"{name} over {report.backend} gave wrong numbers on {_who([report.facts[r] for r in ranks])}: "
            "do not train; test the network and the GPUs of these nodes"
        )


def slow_groups(report: Report) -> Iterator[str]:
    largest = max((b.message for b in report.bandwidths), default=0)
    for collective, scope in dict.fromkeys((b.collective, b.scope) for b in report.bandwidths):
        ours = [b for b in report.bandwidths if (b.collective, b.scope, b.message) == (collective, scope, largest)]
        usual = median(b.speed for b in ours)
        for slow in (b for b in ours if b.speed < SLOW * usual):
            yield (
                f"{collective} {scope} moves {size(slow.speed)}/s among {_who([report.facts[r] for r in slow.group])} "
                f"and {size(usual)}/s elsewhere: compare `nvidia-smi topo -m`, link speed and other users of the node"
            )


def clocks(report: Report) -> Iterator[str]:
    wrong = [facts for facts, skew in zip(report.facts, report.clocks, strict=False) if abs(skew) > CLOCK_SKEW]
    if wrong:
        skew = report.clocks[wrong[0].rank]
        direction = "ahead of" if skew > 0 else "behind"
        yield f"the clock of {_who(wrong)} is {abs(skew):.1f} s {direction} that of rank 0: run NTP on all nodes"


def directories(report: Report) -> Iterator[str]:
    for directory in report.directories:
        for kind in dict.fromkeys(fault.kind for fault in directory.faults):
            faults = [fault for fault in directory.faults if fault.kind == kind]
            ranks = [report.facts[fault.rank] for fault in faults]
            yield _FAULTS[kind].format(who=_who(ranks), path=directory.path, detail=faults[0].detail)
        yield from _space(directory)


def _space(directory: Directory) -> Iterator[str]:
    if directory.free < directory.needed:
        yield (
            f"{directory.path} has {size(directory.free)} free and the run needs {size(directory.needed)} "
            f"({directory.pieces}): free some, lower checkpoint.keep, or choose another output_dir"
        )


_FAULTS = {
    "write": "{who} cannot write in {path} ({detail}): make it writable, or choose another directory",
    "unseen": "{who} does not see in {path} what rank 0 wrote: it is another directory there; put it on a file system "
    "that all nodes share",
    "torn": "{who} found a file of {path} missing or half written while rank 0 replaced it ({detail}): renaming is "
    "not atomic there and a crash could take the checkpoint before with it; choose another file system",
    "stale": "{who} still read the old content in {path} long after rank 0 had replaced it: mount it without "
    "attribute caching (NFS: actimeo=1)",
    "lost": "{who} did not find in {path} what another rank had written and synced ({detail}): the file system loses "
    "concurrent writes; choose another",
}

_CHECKS: tuple[Callable[[Report], Iterable[str]], ...] = (
    size_of_world,
    same_software,
    same_hardware,
    gpu_memory_in_use,
    limits,
    network,
    collectives,
    slow_groups,
    clocks,
    directories,
)


def _differing(ranks: Iterable[Facts], value: Callable[[Facts], str], what: str, remedy: str) -> Iterator[str]:
    """One sentence if not all ranks have the same value; the majority counts as right."""
    values = {facts.rank: (facts, value(facts)) for facts in ranks}
    counts = Counter(found for _, found in values.values())
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    for other in (found for found in counts if found != usual):
        odd = [facts for facts, found in values.values() if found == other]
        yield f"{what} is {other} for {_who(odd)} and {usual} for the others: {remedy}"


def _shares_gpu(facts: Facts, report: Report) -> bool:
    return any(o.gpu_id == facts.gpu_id and o.node_rank == facts.node_rank and o is not facts for o in report.facts)


def _who(ranks: Iterable[Facts]) -> str:
    """For example "ranks 2, 3 (node-b)"."""
    ranks = list(ranks)
    shown = ", ".join(str(facts.rank) for facts in ranks[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    hosts = list(dict.fromkeys(facts.host for facts in ranks))
    places = ", ".join(hosts[:3]) + (", ..." if len(hosts) > 3 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more} ({places})"
