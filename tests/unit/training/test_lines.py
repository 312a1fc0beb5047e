"""Lines between ranks, in one process: who learns of whose end."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from modmoe.training.ranks.lines import Ended, Hub, Line


@pytest.fixture
def connected():
    hub = Hub(3)
    lines = [Line(rank, "127.0.0.1", hub.address) for rank in (1, 2)]
    assert poll(hub) is None  # takes the calls
    yield hub, *lines
    for end in (hub, *lines):
        end.close()


def poll(end, times=3):
    for _ in range(times):
        news = end.poll(0.1)
        if news is not None:
            return news
    return None


def test_a_rank_that_dies_is_known_to_all_others_at_once(connected):
    hub, first, second = connected
    begun = time.monotonic()
    first._line.close()  # as the system does, whatever killed the process
    assert poll(hub) == poll(second) == Ended(1, 1, None)
    assert time.monotonic() - begun < 1


def test_rank_0_that_dies_is_known_to_all(connected):
    hub, *others = connected
    hub.close()
    assert [poll(line) for line in others] == [Ended(0, 1, None)] * 2


def test_a_reason_travels_to_all_with_its_exit_code(connected):
    hub, first, second = connected
    first.say(Ended(1, 2, "the disk is full"))
    first.goodbye()
    assert poll(hub) == poll(second) == Ended(1, 2, "the disk is full")


def test_rank_0_has_words_too(connected):
    hub, *others = connected
    hub.say(Ended(0, 2, "no data"))
    hub.goodbye()
    assert [poll(line) for line in others] == [Ended(0, 2, "no data")] * 2


def test_goodbye_is_no_news(connected):
    hub, first, second = connected
    first.goodbye()
    assert poll(hub) is None
    hub.goodbye()
    assert poll(second) is None


def test_strangers_are_turned_away_and_harm_nobody(connected):
    hub, first, second = connected
    port = int(hub.address.split()[0])
    silent = socket.create_connection(("127.0.0.1", port))
    guess = socket.create_connection(("127.0.0.1", port))
    guess.sendall(json.dumps({"rank": 1, "password": "guess"}).encode() + b"\n")
    scalar = socket.create_connection(("127.0.0.1", port))
    scalar.sendall(b"1\n")
    assert poll(hub) is None
    assert len(hub._ranks) == 2
    silent.close()
    guess.close()
    scalar.close()
    first.say(Ended(1, 1, "x"))
    assert poll(hub) == poll(second) == Ended(1, 1, "x")


def test_a_forked_data_worker_does_not_keep_the_line_open(connected):
    hub, first, _ = connected
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    try:
        first._line.close()
        assert poll(hub) == Ended(1, 1, None)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_many_ranks_call_at_once():
    hub = Hub(40)
    with ThreadPoolExecutor(40) as pool:
        lines = list(pool.map(lambda rank: Line(rank, "127.0.0.1", hub.address), range(1, 40)))
    poll(hub, times=50)
    assert sorted(hub._ranks.values()) == list(range(1, 40))
    hub.goodbye()
    for line in lines:
        line.close()
