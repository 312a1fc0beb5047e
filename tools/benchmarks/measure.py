"""From a workload to a row: one round that does not count, interleaved rounds, memory, and errors."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceiling import Ceiling
from benchmarks.report import Row
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import Contender, Run, Workload


def measure(workload: Workload, stopwatch: Stopwatch, ceiling: Ceiling, rounds: int, tick: Callable[[], None]) -> Row:
    """Let all contenders that can run do the work in turn, on the same fresh inputs in each round.

    Args:
        workload: what to do.
        stopwatch: for the device of its inputs.
        ceiling: for the roofline.
        rounds: that count.
        tick: called after each of them.
    """
    present, absent = _who_can_run(workload)
    times: dict[str, list[float]] = {contender.name: [] for contender in present}
    for turn in range(rounds):
        inputs = workload.draw()
        # Whoever is first finds the inputs in a colder cache than the others.
        for contender in present[turn % len(present) :] + present[: turn % len(present)] if present else []:
            times[contender.name].append(stopwatch.seconds(partial(contender.run, inputs)))
        tick()
    inputs = workload.draw()
    gc.collect()  # what is left of the rounds must not be freed while memory is watched
    bound, least_seconds = ceiling.bound(workload)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return Row(
        name=workload.name,
        rounds=rounds,
        tokens=workload.tokens,
        seconds=seconds,
        quartiles={name: _quartiles(values) for name, values in times.items()},
        ratios=_ratios(present, seconds),
        bound=bound,
        roofline={c.name: least_seconds / seconds[c.name] for c in present if c.whole},
        peak_growth_mib={c.name: stopwatch.peak_growth(partial(c.run, inputs)) for c in present},
        errors=_errors(present, inputs),
        fractions=workload.fractions(seconds),
        absent=absent,
    )


def _who_can_run(workload: Workload) -> tuple[list[Contender], dict[str, str]]:
    """Kernels are compiled and tuned here. Whatever a contender raises says why it is absent: the others go on."""
    present, absent = [], {}
    inputs = workload.draw()
    for contender in workload.contenders:
        try:
            contender.run(inputs)
        except Exception as error:
            absent[contender.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            present.append(contender)
    return present, absent


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _ratios(present: Sequence[Contender], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """How many times as fast as each rival."""
    rivals = {"ours": ("baseline", "peer"), "baseline": ("peer",), "peer": ()}
    return {
        c.name: {r.name: seconds[r.name] / seconds[c.name] for r in present if r.role in rivals[c.role]}
        for c in present
        if c.role != "peer"
    }


def _errors(present: Sequence[Contender], inputs: Any) -> dict[str, dict[str, float]]:
    """Distance from the float64 reference, ||x - reference|| / ||reference||, of each output and gradient."""
    exact_inputs = _to_float64(inputs)
    exact: dict[Run, dict[str, Tensor]] = {}
    errors = {}
    for contender in present:
        if contender.reference not in exact:
            exact[contender.reference] = contender.reference(exact_inputs)
        results = contender.run(inputs)
        reference = exact[contender.reference]
        errors[contender.name] = {name: _distance(x, reference[name]) for name, x in results.items()}
    return errors


def _to_float64(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            return inputs
        return inputs.detach().to(torch.float64).requires_grad_(inputs.requires_grad)
    return type(inputs)(*map(_to_float64, inputs))


def _distance(x: Tensor, reference: Tensor) -> float:
    size = torch.linalg.vector_norm(reference).item()
    distance = torch.linalg.vector_norm(x.to(torch.float64) - reference).item()
    return distance / size if size else (0.0 if distance == 0 else math.inf)
