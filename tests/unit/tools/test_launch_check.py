"""Every problem that tools/launch_check.py can name, from reports made up for it; its probes on real processes."""

import json
import os
import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch_checks import arrival, directory
from launch_checks.arrival import Failure, exchange, meet
from launch_checks.collectives import bandwidths, clock_offset, groups, wrong_collectives
from launch_checks.directory import check_directory
from launch_checks.facts import Expectation, Facts, Place, expectations, gather_facts
from launch_checks.problems import problems
from launch_checks.report import Bandwidth, Directory, Fault, Report, table
from torch.distributed import TCPStore

from tests.launching import CONFIG, ROOT, free_port, run_ranks

GIGABYTE = 10**9


def fact(rank, node_rank=0, **changes):
    usual = Facts(
        rank=rank,
        host=f"node-{'ab'[node_rank]}",
        node_rank=node_rank,
        local_rank=rank % 2,
        versions={"python": "3.12.1", "torch": "2.13.0"},
        code="c0de",
        config="c0f1",
        cores=8,
        threads=4,
        open_files=65536,
        shared_memory=8 * GIGABYTE,
        interface="eth0",
        loopback=False,
    )
    return replace(usual, **changes)


def good(**changes):
    facts = tuple(fact(rank, rank // 2) for rank in range(4))
    return replace(Report(facts, backend="gloo", clocks=(0.0,) * 4), **changes)


def with_gpus(*changes):
    """Four ranks with a GPU each; the last ones are changed."""
    gpu = {"gpus": 2, "gpu": "H100", "gpu_memory": 80 * GIGABYTE, "gpu_free": 79 * GIGABYTE, "driver": "570"}
    facts = [fact(rank, rank // 2, **gpu, gpu_id=f"GPU-{rank}") for rank in range(4)]
    for number, change in enumerate(changes):
        facts[4 - len(changes) + number] = replace(facts[4 - len(changes) + number], **change)
    return good(facts=tuple(facts))


def last(**changes):
    """The last of the four ranks is changed."""
    return good(facts=(*good().facts[:3], replace(good().facts[3], **changes)))


def everywhere(**changes):
    return good(facts=tuple(replace(facts, **changes) for facts in good().facts))


def expecting(*expected):
    return good(expectations=expected)


def faulty(kind, detail="", rank=3):
    return good(directories=(Directory("/runs", 100 * GIGABYTE, 1e8, (Fault(rank, kind, detail),)),))


def speeds(*values):
    return tuple(
        Bandwidth("all-to-all", "within nodes", (2 * i, 2 * i + 1), size, value * size)
        for i, value in enumerate(values)
        for size in (10, 1000)
    )


SIX = tuple(fact(rank, rank // 3, threads=1) for rank in range(6))
PROBLEMS = {
    "fewer ranks": (
        expecting(Expectation("--expect-world", 8)),
        "4 rank.* --expect-world says 8.*RANK and WORLD_SIZE",
    ),
    "more ranks": (expecting(Expectation("hostfile h", 2)), "4 rank.* hostfile h says 2"),
    "fewer tasks": (expecting(Expectation("SLURM_NTASKS", 8, exact=False)), "SLURM_NTASKS says 8"),
    "nodes": (expecting(Expectation("Slurm", nodes=4)), "2 node.* Slurm says 4: start one launcher per node"),
    "hostfile": (
        expecting(Expectation("hostfile /h, which does not exist")),
        "hostfile /h, which does not exist: the launcher .* alone; correct the path",
    ),
    "python": (
        last(versions={"python": "3.11", "torch": "2.13.0"}),
        r"python is 3.11 for rank 3 \(node-b\) and 3.12.1",
    ),
    "package": (last(versions={"python": "3.12.1"}), "torch is not installed for rank 3 .* install the same version"),
    "code": (last(code="01d"), "code of modmoe is 01d for rank 3 .* copy the same sources"),
    "config": (last(config="other"), "configuration is other for rank 3 .* same file"),
    "no gpu": (
        with_gpus({"gpu_id": "", "gpus": 1}),
        r"rank 3 .* no GPU of its own \(1 visible, local rank 1\): .*nvidia-smi",
    ),
    "one gpu for two": (with_gpus({"gpu_id": "GPU-2"}), r"ranks 2, 3 .* share one GPU: .*CUDA_VISIBLE_DEVICES"),
    "gpu model": (with_gpus({"gpu": "A100"}), "GPU model is A100 for rank 3 .*H100"),
    "gpu memory": (
        with_gpus({"gpu_memory": 41 * GIGABYTE, "gpu_free": 40 * GIGABYTE}),
        "GPU memory is 41 GB for rank 3",
    ),
    "driver": (with_gpus({"driver": "535"}), "driver is 535 for rank 3 .*install the same"),
    "gpu in use": (
        with_gpus({"gpu_free": 50 * GIGABYTE}),
        "rank 3 .*: 30 GB of 80 GB .*in use already: end the process",
    ),
    "open files": (last(open_files=256), r"rank 3 .* may open 256 files.*ulimit -n"),
    "cores": (everywhere(cores=1, threads=0), r"2 ranks on node-a share 1 core\(s\): .*--cpus-per-task"),
    "threads": (everywhere(threads=8), "OMP_NUM_THREADS=8 each have 8 core.*set OMP_NUM_THREADS=4"),
    "shared memory": (
        with_gpus(*[{"shared_memory": 64 * 10**6}] * 4),
        "/dev/shm on node-a holds 64 MB.*--shm-size",
    ),
    "loopback": (last(loopback=True), "host name of rank 3 .* loopback .*GLOO_SOCKET_IFNAME=eth0"),
    "wrong sums": (
        good(wrong={"all-reduce": (1, 2)}),
        r"all-reduce over gloo gave wrong numbers on ranks 1, 2 \(node-a, ",
    ),
    "slow node": (
        good(facts=SIX, clocks=(), bandwidths=speeds(9, 1, 10)),
        r"all-to-all within nodes moves 1 kB/s among ranks 2, 3 .* and 9 kB/s elsewhere: compare",
    ),
    "clock": (good(clocks=(0.0, 0.0, -7.5, -7.5)), r"clock of ranks 2, 3 \(node-b\) is 7.5 s behind .* NTP"),
    "write": (faulty("write", "Permission denied"), r"rank 3 .* cannot write in /runs \(Permission denied\): make it"),
    "unseen": (faulty("unseen"), "rank 3 .* does not see in /runs .*file system that all nodes share"),
    "torn": (faulty("torn", "3 of 8 bytes"), "half written .*3 of 8 bytes.* not atomic.*choose another"),
    "stale": (faulty("stale"), "rank 3 .* old content .*actimeo"),
    "lost": (faulty("lost", "the file of rank 0"), "rank 3 .*the file of rank 0.* loses concurrent writes; choose"),
    "space": (
        good(directories=(Directory("/runs", 2 * GIGABYTE, 1e8, (), 5 * GIGABYTE, "3 checkpoints"),)),
        r"/runs has 2 GB free and the run needs 5 GB \(3 checkpoints\): free some",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_is_one_sentence_with_its_remedy(name):
    report, sentence = PROBLEMS[name]
    found = problems(report)
    # A setting of the node is said once per node.
    assert len(found) == (2 if name in ("cores", "threads", "shared memory") else 1), found
    assert re.search(sentence, found[0]), found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    "report",
    [
        good(),
        with_gpus(),
        expecting(Expectation("--expect-world", 4), Expectation("SLURM_NTASKS", 2, exact=False)),
        good(bandwidths=speeds(9, 8)),
        good(directories=(Directory("/runs", 5 * GIGABYTE, 1e8, (), 4 * GIGABYTE, "3 checkpoints"),)),
        replace(last(loopback=True), facts=tuple(replace(f, node_rank=0, threads=2) for f in good().facts)),
    ],
)
def test_a_good_launch_has_no_problem(report):
    assert problems(report) == []


def test_the_table_shows_what_was_found():
    report = good(
        bandwidths=speeds(1, 3),
        directories=(Directory("/runs", 5 * GIGABYTE, 1e8, (), 4 * GIGABYTE, "3 checkpoints"),),
        expectations=(Expectation("--expect-world", 4), Expectation("Slurm", nodes=2)),
    )
    shown = table(report)
    for text in (
        "4 on 2 node(s) (node-a: 2, node-b: 2)",
        "4 ranks by --expect-world; 2 nodes by Slurm",
        "torch 2.13.0",
        "over gloo, right",
        "directory /runs: 5 GB free, 4 GB needed; all ranks write at 100 MB/s each",
        "all-to-all within nodes        20 B        2 kB",
    ):
        assert text in shown, shown
    assert "wrong" in table(replace(report, wrong={"all-reduce": (0,)}))


# ---- How many ranks were meant ----


def launcher(*options, cwd=Path("/")):
    return [(["python", "-m", "deepspeed.launcher.runner", *options, "train.py", "-H", "not-this"], cwd)]


def test_a_hostfile_counts_slots_and_nodes(tmp_path):
    (tmp_path / "hosts").write_text("# two of them\na slots=4\n\nb slots=2  # smaller\n")
    (found,) = expectations(None, {}, launcher("-H", "hosts", cwd=tmp_path) * 2)
    assert (found.ranks, found.nodes, found.exact) == (6, 2, True)
    (found,) = expectations(None, {}, launcher("--hostfile=hosts", "--num_gpus", "1", cwd=tmp_path))
    assert (found.ranks, found.nodes) == (None, None)


def test_a_hostfile_that_does_not_exist_is_a_problem(tmp_path):
    found = expectations(None, {}, launcher("--hostfile", "hosst", cwd=tmp_path))
    assert "does not exist" in problems(good(expectations=tuple(found)))[0]


def test_other_commands_have_other_options_of_that_name():
    assert expectations(None, {}, [(["ssh", "-H", "x"], Path("/")), (["torchrun", "train.py"], Path("/"))]) == []


def test_schedulers_say_how_many():
    environment = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "OMPI_COMM_WORLD_SIZE": "3"}
    found = expectations(8, environment, [])
    assert [(e.ranks, e.nodes, e.exact) for e in found] == [
        (8, None, True),
        (None, 2, True),
        (16, None, False),
        (3, None, False),
    ]


# ---- Arrival ----


def place(rank, world_size, port):
    return Place(rank, world_size, rank, 0, "127.0.0.1", port, "here")


def test_who_does_not_arrive_is_named_in_time():
    here = place(0, 3, free_port())
    store = meet(here, {}, 5)
    other = TCPStore(here.address, here.port, 3, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    other.set("facts/2", json.dumps(fact(2).__dict__))
    begun = time.monotonic()
    with pytest.raises(
        Failure, match=r"rank\(s\) 1 of 3 did not arrive within 1 s \(the others are on node-a\): see what"
    ):
        exchange(store, here, fact(0), 1)
    assert time.monotonic() - begun < 3
    # Rank 2 is told to leave, without a message of its own.
    with pytest.raises(Failure, match="^$"):
        exchange(other, place(2, 3, here.port), fact(2), 1)


def test_a_rank_that_finds_nobody_says_where_it_looked():
    with pytest.raises(Failure, match=r"rank 1 on here did not reach rank 0 at 127.0.0.1:\d+ within 1 s: check that"):
        meet(place(1, 2, free_port()), {}, 1)


def test_a_port_that_is_taken_is_named():
    port = free_port()
    first = meet(place(0, 1, port), {}, 5)
    with pytest.raises(Failure, match=f"cannot listen on port {port}: another program has it.*--master_port"):
        meet(place(0, 1, port), {}, 5)
    assert first.port == port


def test_what_hangs_is_ended_with_a_message(monkeypatch, capfd):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with arrival.bounded("a dead disk", "buy another", place(1, 2, 0), 0.05):
        time.sleep(0.3)
    assert left == [1]
    assert "rank 1 on here: a dead disk did not end within 0 s: buy another" in capfd.readouterr().err
    with arrival.bounded("a living disk", "keep it", place(1, 2, 0), 0.05):
        pass
    time.sleep(0.1)
    assert left == [1]


# ---- On real ranks ----


def probe_everything(tmp_path):
    rank = dist.get_rank()
    facts = [
        replace(gather_facts(Place.of(os.environ), ""), rank=r, node_rank=r // 2, local_rank=r % 2) for r in range(3)
    ]
    speeds = bandwidths(groups(facts), torch.device("cpu"))
    own = tmp_path / f"mine-{rank}"
    directory.PATIENCE = 0.2
    return {
        "wrong": wrong_collectives(torch.device("cpu")),
        "speeds": [(s.collective, s.scope, s.group, s.speed > 0) for s in speeds if s.message == 2**24],
        "clock": clock_offset(),
        "shared": check_directory(tmp_path / "shared", "t"),
        "unshared": check_directory(own, "t"),
        "blocked": check_directory(Path(__file__) / "below", "t"),
    }


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    path = tmp_path_factory.mktemp("probed")
    return run_ranks(probe_everything, 3, path), path


def test_collectives_are_right_on_this_machine(probed):
    assert [result["wrong"] for result in probed[0]] == [[], [], []]
    assert all(abs(result["clock"]) < 0.5 for result in probed[0])


def test_speeds_are_measured_in_all_within_and_between_nodes(probed):
    found = [speed for result in probed[0] for speed in result["speeds"]]
    assert set(found) == {
        (collective, *scope, True)
        for collective in ("all-to-all", "all-reduce")
        for scope in (("all ranks", (0, 1, 2)), ("within nodes", (0, 1)), ("between nodes", (0, 2)))
    }


def test_a_shared_directory_is_good_and_left_as_it_was(probed):
    results, path = probed
    assert results[0]["shared"].faults == ()
    assert results[0]["shared"].write_speed > 0
    assert results[1]["shared"] is None
    assert list((path / "shared").iterdir()) == []


def test_a_directory_that_is_not_shared_is_noticed_by_the_others(probed):
    assert probed[0][0]["unshared"].faults == (Fault(1, "unseen"), Fault(2, "unseen"))


def test_a_directory_that_cannot_be_written_is_noticed_by_rank_0(probed):
    (fault,) = probed[0][0]["blocked"].faults
    assert (fault.rank, fault.kind, fault.detail) == (0, "write", "Not a directory")


def watch(monkeypatch, tmp_path, *contents):
    """What rank 1 says if it reads these while rank 0 replaces the file."""
    monkeypatch.setattr(directory, "_reading", lambda _: iter(contents))
    probe = directory._Probe(tmp_path, 1, 2)
    probe.replace_or_watch()
    return [(fault.kind, fault.detail) for fault in probe.faults]


def test_a_replacement_that_is_not_atomic_or_late_is_noticed(monkeypatch, tmp_path):
    old, new = (directory._content(seed, directory.PROBE_BYTES) for seed in (0, 1))
    assert watch(monkeypatch, tmp_path, old, old, new) == []
    assert watch(monkeypatch, tmp_path, old, None, new) == [("torn", "missing")]
    assert watch(monkeypatch, tmp_path, old, new[:7]) == [("torn", f"7 of {len(new)} bytes")]
    assert watch(monkeypatch, tmp_path, old, old) == [("stale", "")]


def test_a_lost_write_is_noticed(monkeypatch, tmp_path):
    probe = directory._Probe(tmp_path, 1, 2)
    monkeypatch.setattr(directory, "PATIENCE", 0.0)
    probe.write()
    probe.read_neighbour()
    assert probe.faults == [Fault(1, "lost", "the file of rank 0")]


# ---- What a run needs ----


def test_space_for_checkpoints_is_counted_without_making_the_model():
    from launch_checks.needs import Needs

    needs = Needs(CONFIG, ["--checkpoint.keep", "3"])
    # The exported file of this model has 229,400 bytes with its header.
    assert needs.num_parameters() == pytest.approx(229_400 / 4, rel=0.05)
    needed, pieces = needs.checkpoint_space()
    assert needed == needs.num_parameters() * (4 * 16 + 4)
    assert pieces.startswith("4 checkpoints of 0.00")
    assert needs.digest != Needs(CONFIG, ["--checkpoint.keep", "4"]).digest
    assert needs.digest == Needs(CONFIG, ["--checkpoint.keep", "3"]).digest


def test_every_kind_of_run_is_read():
    from launch_checks.needs import Needs

    tuning = Needs(ROOT / "configs" / "train" / "finetune.yaml")
    assert tuning.run.finetuning.method
    distillation = Needs(ROOT / "configs" / "distill" / "tiny_test.yaml", ["--tokenizer", "{vocab_size: 280}"])
    assert distillation.run.distillation.method == "modules"
    assert distillation.checkpoint_space()[1].endswith("the final model, beside the teacher, stages and their signals")
