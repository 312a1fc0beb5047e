"""Stick-breaking attention against stored numbers of the stickbreaking-attention project's reference.

Each case holds inputs, and outputs and gradients in float64 for the strict and the current form and three objectives.
Tolerances come with the data: 1e-10 in float64, ten times the reference's own error in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modmoe.ops import stickbreaking_attention
from modmoe.ops.build import cpu_problem

DATA = Path(__file__).parent / "data" / "stickbreaking"
CASES = ["dense_small", "dense_t128", "dense_t1", "varlen", "extreme_x50"]
OBJECTIVES = {
    "out_rem": lambda out, rem, v, do, drem: (out * do).sum() + (rem * drem).sum(),
    "out_only": lambda out, rem, v, do, drem: (out * do).sum(),
    "out_plus_rem_v": lambda out, rem, v, do, drem: ((out + rem[..., None] * v) * do).sum(),
}


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("form", ["strict", "current"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, form: str, dtype: torch.dtype, backend: str) -> None:
    golden = load_file(DATA / case / "golden.safetensors")
    tolerances = json.loads((DATA / case / "meta.json").read_text())["tolerances"]
    cu_seqlens = golden.get("cu_seqlens")
    batched = cu_seqlens is None  # the packed case is stored without a batch dim

    def load(name: str) -> torch.Tensor:
        tensor = golden[name].to(dtype)
        return tensor if batched else tensor[None]

    def check(name: str, actual: torch.Tensor) -> None:
        expected = golden[f"{form}.f64.{name}"]
        atol = tolerances[name]["atol_" + str(dtype).removeprefix("torch.")]
        actual = actual.detach().double()
        torch.testing.assert_close(
            actual if batched else actual[0], expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}"
        )

    if backend == "cpp" and (problem := cpu_problem(load("q"))):
        pytest.skip(problem)
    for objective, loss in OBJECTIVES.items():
        q, k, v = (load(name).clone().requires_grad_() for name in "qkv")
        out, rem = stickbreaking_attention(
            q, k, v, attend_current=form == "current", cu_seqlens=cu_seqlens, backend=backend
        )
        loss(out, rem, v, load("do"), load("drem")).backward()
        check("out", out)
        check("rem", rem)
        for name, leaf in zip("qkv", (q, k, v), strict=True):
            check(f"{objective}.d{name}", leaf.grad)


@pytest.mark.parametrize("form", ["strict", "current"])
@pytest.mark.parametrize("case", ["dense_small", "dense_t1"])
def test_weights(case: str, form: str) -> None:
    golden = load_file(DATA / case / "golden.safetensors")
    q, k, v = (golden[name].double() for name in "qkv")
    *_, weights = stickbreaking_attention(q, k, v, attend_current=form == "current", return_weights=True)
    torch.testing.assert_close(weights, golden[f"{form}.f64.att"], rtol=0, atol=1e-10)
