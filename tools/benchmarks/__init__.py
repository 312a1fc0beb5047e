"""The parts of tools/bench.py.

workload.py     what is measured: inputs, contenders, and the work that none of them can avoid
stopwatch.py    seconds and memory of one call, on the CPU and on a CUDA device
ceiling.py      what the machine can do: a large matrix product and a large copy
measure.py      interleaved rounds and errors: a workload becomes a row
report.py       rows as text and as JSON
environment.py  hardware, versions, commit
attention.py, products.py, experts.py, routing.py, models.py, trained.py    the workloads
suites.py       which of them `cpu` and `gpu` stand for, and their sizes
"""
