"""The walk-through of docs/lifecycle.md, block by block in its order, on a toy model.

Commands run as they are printed, in a directory whose `configs/` are shrunk; `NUMBERS` of their arguments are shrunk
as well. Scripts run in forked processes that have torch loaded already, as the launcher's only rank; one training
really starts as printed.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.launching import ENVIRONMENT, ROOT, TIMEOUT, deepspeed_command, run_ranks

pytest.importorskip("deepspeed")
pytest.importorskip("matplotlib")

PAGE = (ROOT / "docs" / "lifecycle.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
NUMBERS = {
    "--tokens 65536": "--tokens 256 --sequence-length 32",
    "steps: 100}}": "steps: 2, every: 1, blocks: 4}}",
    "--optimization.steps 400": "--optimization.steps 4",
    "--model.intermediate_size 512": "--model.intermediate_size 32",
    "64 * 256": "4 * 32",
    "ids.split(256)": "ids.split(32)",
}
"""What is printed -> what the test runs."""
EXTENSION_RUN = "deepspeed train/finetune.py --config configs/train/extend.yaml"


def shrink(config, steps):
    """A run's YAML file at the size of a toy."""
    content = yaml.safe_load(config.read_text())
    content["data"]["sequence_length"] = 32
    for source in content["data"]["sources"]:
        source |= {"max_bytes": 80_000, "max_validation_bytes": 20_000}
    content["optimization"] |= {"steps": steps, "micro_batch_size": 2, "warmup_steps": 1, "precision": "fp32"}
    content["evaluation"] = {"interval": 100, "blocks_per_domain": 4, "final_blocks_per_domain": 4}
    content["checkpoint"] = {"interval": 100}
    content["logging"] = {"interval": 1, "tensorboard": False}
    if "tokenizer" in content:
        content["tokenizer"] = {"vocab_size": 300, "sample_bytes": 100_000}
    config.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory like the root of the repository, with small configs."""
    place = tmp_path_factory.mktemp("lifecycle")
    for name in ("tools", "train"):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", place / "configs")
    for name, steps in (("quickstart", 8), ("finetune", 4), ("extend", 6)):
        shrink(place / "configs" / "train" / f"{name}.yaml", steps)
    preset = place / "configs" / "model" / "tiny.yaml"
    sizes = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    preset.write_text(yaml.safe_dump(yaml.safe_load(preset.read_text()) | sizes | {"intermediate_size": 32}))
    return place


def in_rank(place, script, arguments):
    """What a script prints when it is run in a process of its own, and its exit code; or a python block."""
    os.chdir(place)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            if arguments is None:
                exec(compile(script, "docs/lifecycle.md", "exec"), {"__name__": "__main__"})
            else:
                sys.argv = [script, *arguments]
                sys.path.insert(0, str(Path(script).parent.resolve()))
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return end.code or 0, printed.getvalue()
    return 0, printed.getvalue()


def run_command(place, line):
    """Exit code and output of one line of a bash block."""
    program, *arguments = shlex.split(line)
    if program in ("deepspeed", "python") and line != EXTENSION_RUN:
        return run_ranks(in_rank, 1, place, arguments[0], arguments[1:], joined=False)[0]
    command = deepspeed_command(1) if program == "deepspeed" else [program]
    run = subprocess.run(
        [*command, *arguments],
        cwd=place,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.fixture(scope="module")
def outputs(place):
    """Command or python block -> what it printed, after all of them have run."""
    outputs = {}
    for language, block in BLOCKS:
        for shown in [block] if language == "python" else re.sub(r" \\\n +", " ", block).splitlines():
            small = shown
            for printed, number in NUMBERS.items():
                small = small.replace(printed, number)
            if language == "python":
                code, outputs[shown] = run_ranks(in_rank, 1, place, small, None, joined=False)[0]
            else:
                code, outputs[shown] = run_command(place, small)
            assert code == 0, f"{shown}\n{outputs[shown]}"
    return outputs


def size(directory):
    return sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())


def test_the_walk_through_runs_and_keeps_its_promises(place, outputs):
    runs = place / "runs"
    assert all(number in PAGE for number in NUMBERS)
    assert sum(line.startswith(("deepspeed", "python ")) for line in outputs) >= 18
    assert (runs / "usage" / "index.html").is_file()

    # Pruned: smaller, of one shape with the recovered one, and both are generated with by the python block.
    assert size(runs / "pruned") == size(runs / "recovered" / "final") < size(runs / "specialist" / "final")
    compared = next(output for block, output in outputs.items() if "model.generate" in block)
    sizes = dict(re.findall(r"^(\S+): ([\d,]+) parameters", compared, re.MULTILINE))
    assert sizes["quickstart/final"] == sizes["specialist/final"]
    assert sizes["pruned"] == sizes["recovered/final"] != sizes["quickstart/final"]

    # Extended: trained alone, old weights stay; who uses it is told; the pack makes the round.
    old, new = (load_file(runs / name / "model.safetensors") for name in ("quickstart/final", "c/final"))
    assert all(new[name].equal(tensor) for name, tensor in old.items())
    assert any(name.endswith("down_proj") and new[name].any() for name in new.keys() - old.keys())
    metrics = [json.loads(line) for line in (runs / "c" / "metrics.jsonl").read_text().splitlines()]
    assert any("router/c/ffn/layer_00/used" in record for record in metrics)
    assert "c/ffn used" in outputs[EXTENSION_RUN]
    assert "python only evaluated" in outputs[EXTENSION_RUN]
    applied = load_file(runs / "applied" / "model.safetensors")
    assert applied.keys() == new.keys()
    assert all(applied[name].equal(tensor) for name, tensor in new.items())
    assert (runs / "restored" / "model.safetensors").read_bytes() == (
        runs / "quickstart" / "final" / "model.safetensors"
    ).read_bytes()
    assert (runs / "joint" / "final" / "config.json").is_file()

    # Upcycled.
    upcycled = next(output for block, output in outputs.items() if "upcycled-sparse" in block and "torch" in block)
    assert "dense/final: differs by 0.0e+00" in upcycled


def test_paths_of_the_page_exist():
    paths = set(re.findall(r"\b(?:configs|tools|train|docs)/[\w./-]*\w", PAGE))
    assert paths
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]
