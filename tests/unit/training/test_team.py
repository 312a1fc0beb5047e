"""Waiting and comparing through the store, with threads for ranks."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from modmoe.training.errors import ConfigError, RunError, SharedError
from modmoe.training.ranks.agreement import check_agreement, data_fingerprint, run_fingerprint, source_digest
from modmoe.training.ranks.team import Team, join


def as_ranks(size, work, absent=()):
    """What `work(team)` gives or raises on each rank."""
    store, results = dist.HashStore(), [None] * size

    def run(rank):
        try:
            results[rank] = work(Team(rank, size, store))
        except RunError as error:
            results[rank] = error
        except ConfigError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_everyone_gets_every_value():
    assert as_ranks(3, lambda team: team.gather("x", team.rank * 10, 5)) == [[0, 10, 20]] * 3


def test_those_who_do_not_come_are_named_by_all():
    results = as_ranks(4, lambda team: team.gather("start", None, 0.3), absent=(1, 3))
    for rank in (0, 2):
        assert isinstance(results[rank], SharedError)
        assert str(results[rank]).startswith("ranks 1, 3 of 4 did not come to 'start' within 0 s")


def test_one_rank_of_a_node_goes_first():
    order, lock = [], threading.Lock()

    def work(team):
        team._node = "ab"[team.rank % 2]
        with team.first_on_each_node("data"):
            time.sleep(0.05)
            with lock:
                order.append(team.rank)

    as_ranks(4, work)
    assert sorted(order[:2]) == [0, 1]
    assert sorted(order) == [0, 1, 2, 3]


def test_a_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    team = join(1, 1)
    assert team.gather("x", 3, 0) == [3]
    with team.first_on_each_node("data"):
        pass
    check_agreement(team, "x", {"a": "1"}, 0)


def test_ranks_that_differ_are_told_which_and_how():
    values = ["1", "1", "2", "1"]
    facts = [{"seed": value, "version of torch": "2.13"} for value in values]
    facts[3]["version of torch"] = "2.12"
    results = as_ranks(4, lambda team: check_agreement(team, "configuration", facts[team.rank], 5))
    assert all(isinstance(result, ConfigError) for result in results)
    assert len({str(result) for result in results}) == 1
    assert "seed is 2 on rank 2 and 1 on 3 ranks (0, 1, 3)" in str(results[0])
    assert "version of torch is 2.12 on rank 3 and 2.13 on 3 ranks (0, 1, 2)" in str(results[0])
    assert "same command, files and versions" in str(results[0])


def test_a_key_that_one_rank_lacks_is_a_difference():
    results = as_ranks(2, lambda team: check_agreement(team, "data", {"x": "1"} if team.rank else {}, 5))
    assert "x is missing on rank 0 and 1 on rank 1" in str(results[0])


def test_the_fingerprint_of_a_run(make_run):
    here = run_fingerprint(make_run())
    assert here == run_fingerprint(make_run({"data.cache_dir": "/elsewhere", "data.workers": 3}))
    there = run_fingerprint(make_run({"optimization.learning_rate": 0.5}))
    assert {key for key in here if here[key] != there[key]} == {"optimization.learning_rate"}
    assert here["source code of modmoe"] == source_digest()
    assert "version of deepspeed" in here


def test_the_fingerprint_of_the_data(make_run):
    from modmoe.training.pretraining import prepare_run_data

    one, other = (
        data_fingerprint(prepare_run_data(make_run(change))) for change in ({}, {"tokenizer.vocab_size": 290})
    )
    assert one["training tokens of words"] != "0"
    assert one["vocabulary"] != other["vocabulary"]


def test_a_port_that_is_taken_and_an_address_that_does_not_answer(monkeypatch):
    # Another test of this process may have left a group, whose store would be used.
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(RunError, match=f"port {port} of 127.0.0.1 is taken.*--master_port"):
        join(0.5, 1)
    taken.close()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    begun = time.monotonic()
    with pytest.raises(RunError, match="port 1 of 127.0.0.1 was not answered within 1 s of rank 1 on .* MASTER_ADDR"):
        join(1, 1)
    assert time.monotonic() - begun < 10
