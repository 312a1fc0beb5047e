"""The harness itself: ranks that answer, raise, die or hang; processes that are left behind; two nodes."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.launching import run_ranks


def total(values):
    mine = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(mine)
    return dist.get_rank(), mine


def misbehave(how):
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one is unwell")
        if how == "die":
            os._exit(9)
        time.sleep(60)
    dist.barrier()


def test_ranks_return_their_results_in_order():
    assert run_ranks(total, 3, [1, 10, 100]) == [(0, 111), (1, 111), (2, 111)]


@pytest.mark.parametrize(
    ("how", "said"), [("raise", "rank one is unwell"), ("die", "rank 1 died"), ("hang", "[0, 1]")]
)
def test_a_rank_that_fails_is_named_and_nobody_is_left(how, said):
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=said.replace("[", r"\[")):
        run_ranks(misbehave, 2, how, timeout=3)
    assert time.monotonic() - begun < 20


def test_a_process_that_left_its_group_is_found(start):
    detached = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    run = start("detached", [sys.executable, "-c", detached])
    assert run.wait() == 0
    with pytest.raises(AssertionError, match="are left"):
        run.wait_for_group(timeout=0.5)
    run.kill()
    run.wait_for_group(timeout=5)


def test_two_nodes_reach_each_other_and_nothing_else(nodes):
    first, second = nodes
    ask = "import socket, sys; s = socket.create_server((sys.argv[1], 5000)); print(flush=True); s.accept()"
    with subprocess.Popen(
        [*second.prefix, sys.executable, "-c", ask, second.address], stdout=subprocess.PIPE
    ) as listener:
        listener.stdout.readline()
        connect = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=5)"
        subprocess.run([*first.prefix, sys.executable, "-c", connect, second.address], check=True)
    routes = subprocess.run([*first.prefix, "ip", "route"], capture_output=True, text=True, check=True).stdout
    assert "default" not in routes
