"""tools/launch_check.py under the real launchers."""

import json
import sys

import pytest

from tests.launching import CONFIG, ROOT, deepspeed_command, free_port

SCRIPT = str(ROOT / "tools" / "launch_check.py")


def test_under_deepspeed_it_counts_the_ranks(start, workspace):
    found = workspace / "found.json"
    run = start(
        "check", [*deepspeed_command(2), SCRIPT, "--expect-world", "3", "--dir", str(workspace), "--json", str(found)]
    )
    assert run.wait() == 1
    report = json.loads(found.read_text())
    (problem,) = report["problems"]
    assert "the world has 2 rank(s), but --expect-world says 3" in problem
    assert run.output.count(f"problem: {problem}") == 1
    assert "collectives: over gloo, right" in run.output
    assert [facts["rank"] for facts in report["facts"]] == [0, 1]
    assert report["directories"][0]["faults"] == []
    run.wait_for_group(timeout=10)


@pytest.mark.slow
def test_under_torchrun_with_the_needs_of_a_run(start, workspace):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--config", str(CONFIG), "--output_dir", str(workspace / "out"), "--data.cache_dir", str(workspace)]
    run = start("torchrun", [*torchrun, "--master-port", str(free_port()), SCRIPT, *options])
    assert run.wait() == 0, run.output
    assert f"directory {workspace / 'out'}: " in run.output
    assert "MB needed" in run.output
    assert "no problems found" in run.output


def test_mistakes_in_the_arguments_end_at_once(start):
    run = start("unknown", [sys.executable, SCRIPT, "--no_such_key", "3"])
    assert run.wait() == 2
    assert "unknown arguments --no_such_key 3; keys of a run need --config" in run.output


def on_nodes(start, nodes, hostfile, *options, ranks=(0, 1), environment=None):
    port = str(free_port())
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-H", str(hostfile), "--no_ssh"]
    runs = []
    for rank in ranks:
        where = ["--node_rank", str(rank), "--master_addr", nodes[0].address, "--master_port", port]
        settings = nodes[rank].environment if environment is None else environment
        command = [*nodes[rank].prefix, *launcher, *where, SCRIPT, "--timeout", "15", *options]
        runs.append(start(f"node-{rank}", command, settings))
    return runs


@pytest.fixture
def hostfile(nodes, workspace):
    path = workspace / "hosts"
    path.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    return path


@pytest.mark.slow
def test_two_nodes(start, nodes, hostfile, workspace):
    runs = on_nodes(start, nodes, hostfile, "--dir", str(workspace))
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert "expected: 2 ranks on 2 nodes by hostfile" in runs[0].output
    assert "all-to-all between nodes" in runs[0].output


@pytest.mark.slow
def test_a_hostfile_that_is_not_there_is_a_world_of_one(start, nodes, workspace):
    (run,) = on_nodes(start, nodes, workspace / "hosst", ranks=[0])
    assert run.wait() == 1
    assert "hosst, which does not exist: the launcher went on with 1 rank(s)" in run.output


@pytest.mark.slow
def test_a_node_that_was_not_started(start, nodes, hostfile):
    (run,) = on_nodes(start, nodes, hostfile, ranks=[0])
    assert run.wait() == 1
    assert "problem: rank(s) 1 of 2 did not arrive within 15 s" in run.output
    (run,) = on_nodes(start, nodes, hostfile, ranks=[1])
    assert run.wait() == 1
    assert f"rank 1 on {nodes[1].host} did not reach rank 0 at {nodes[0].address}" in run.output


@pytest.mark.slow
def test_nodes_that_gloo_cannot_connect(start, nodes, hostfile):
    """Without an interface named, gloo listens on the address of the host's name, here a loopback one."""
    runs = on_nodes(start, nodes, hostfile, environment={})
    assert [run.wait() for run in runs] == [1, 1]
    assert all("GLOO_SOCKET_IFNAME=veth0" in run.output for run in runs)
