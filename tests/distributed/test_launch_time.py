"""How long a launch takes to its first step."""

import pytest

pytestmark = pytest.mark.slow
LIMIT = 15.0


def test_the_first_step_comes_within_15_seconds_of_processor_time(launch, workspace):
    """
    Wall-clock time says more about what else a machine does. The processor time of the launchers and of the slowest
    rank, one after the other, is the wall-clock time of an idle machine with a core for each rank.
    """
    assert launch("warm", "--optimization.steps", "1", processes=1).wait() == 0  # text and kernels are made once
    run = launch("timed", "--optimization.steps", "100000", "--evaluation.interval", "0", processes=2)
    run.wait_for("step 1/")
    ranks = {process.pid: _seconds(process) for process in run.ranks().values()}
    launchers = [_seconds(process) for process in run.processes() if process.pid not in ranks]
    run.kill()
    seconds = sum(launchers) + max(ranks.values())
    print(f"launchers {launchers}, ranks {list(ranks.values())}: {seconds:.1f} s")
    assert len(ranks) == 2
    assert seconds <= LIMIT


def _seconds(process):
    times = process.cpu_times()
    return times.user + times.system
