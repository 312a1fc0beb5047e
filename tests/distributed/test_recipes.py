"""Commands of docs/distributed.md and the Slurm script, run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import CONFIG, ENVIRONMENT, ROOT, free_port

TEXT = (ROOT / "docs" / "distributed.md").read_text()
SLURM = ROOT / "configs" / "launch" / "slurm.sh"
# Two tasks on one node, with the variables that Slurm gives them.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & tasks[$task]=$!; done
code=0
for task in 0 1; do wait ${tasks[$task]} || code=$?; done
exit $code
"""

# Nodes that are processes of this machine: pdsh replaces %n by the number of the node.
PDSH = """#!/bin/bash
IFS=, read -ra nodes <<< "$5"
shift 5  # -S -f FAN_OUT -w NODES
for node in ${!nodes[@]}; do bash -c "${*//%n/$node}" & tasks[$node]=$!; done
code=0
for node in ${!nodes[@]}; do wait ${tasks[$node]} || code=$?; done
exit $code
"""
SSH = """#!/bin/bash
[[ "$*" != *"hostname -I" ]] || echo 127.0.0.1
"""


def test_paths_exist():
    paths = set(re.findall(r"\b(?:configs|tools|train|docs|tests)/[\w./-]*\w", TEXT)) - {"configs/train/my.yaml"}
    assert len(paths) >= 5
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.fixture
def here(tmp_path):
    """A working directory with our files; the commands find this Python first."""
    for name in ("train", "tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def environment(here, **more):
    path = os.pathsep.join([str(here / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **ENVIRONMENT, "PATH": path, **more}


@pytest.mark.slow
def test_commands_for_the_cpu(here):
    (commands,) = re.findall(r"<!-- cpu -->\n```bash\n(.*?)```", TEXT, re.DOTALL)
    result = subprocess.run(["bash", "-e", "-c", commands], cwd=here, env=environment(here), capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    assert b"no problems found" in result.stdout
    for run in ("tiny_test", "tiny_torchrun"):
        assert (here / "runs" / run / "final" / "model.safetensors").exists()


def install(here, **programs):
    for name, script in programs.items():
        (here / "bin" / name).write_text(script)
        (here / "bin" / name).chmod(0o755)


@pytest.mark.slow
def test_a_hostfile_with_nodes_that_are_processes(here):
    install(here, pdsh=PDSH, ssh=SSH)
    (here / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    port = ["--master_port", str(free_port())]
    train = ["train/pretrain.py", "--config", str(CONFIG), "--output_dir", "runs/hosts"]
    command = ["deepspeed", "--hostfile", "hosts", *port, *train]
    result = subprocess.run(command, cwd=here, env=environment(here), capture_output=True, timeout=300)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    assert "processes: 2" in (here / "runs" / "hosts" / "run.yaml").read_text()
    assert (here / "runs" / "hosts" / "final" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_slurm_script_with_tasks_that_are_processes(here):
    install(here, srun=SRUN, scontrol="#!/bin/bash\necho 127.0.0.1\n")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    command = ["bash", str(SLURM), str(CONFIG), "--output_dir", "runs/slurm"]
    result = subprocess.run(command, cwd=here, env=environment(here, **job), capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    assert b"2 ranks by SLURM_NTASKS" in result.stdout
    assert (here / "runs" / "slurm" / "final" / "model.safetensors").exists()
    assert "processes: 2" in (here / "runs" / "slurm" / "run.yaml").read_text()
