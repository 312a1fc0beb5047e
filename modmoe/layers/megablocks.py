"""megablocks' grouped GEMM behind transformers' experts interface: `experts_implementation="megablocks"`.

Optional: megablocks 0.10 asks for torch < 2.7.1, so it has to be built beside this package; see docs/interfaces.md.
Letters as in `grouped_experts.py`.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from modmoe.layers.grouped_experts import Experts, activate, combine, expert_weights, finish
from modmoe.ops import dispatch_plan

NAME = "megablocks"


def megablocks_experts_forward(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """
    As `modmoe_experts_forward`, by megablocks' grouped GEMM. It wants row counts on the host: one sync per call.

    Raises:
        ImportError: megablocks or its grouped GEMM cannot be imported.
        RuntimeError: tensors that are not bfloat16 on a CUDA device.
    """
    gmm = grouped_gemm()
    up_proj, down_proj = expert_weights(self)
    _check(hidden_states, up_proj)
    plan = dispatch_plan(top_k_index, up_proj.shape[0])
    num_rows = plan.tokens_per_expert.to("cpu", torch.int64)
    rows = hidden_states.index_select(0, plan.order // top_k_index.shape[-1])
    rows = activate(self, _multiply(gmm, rows, up_proj, num_rows), plan, top_k_index)
    rows = finish(self, _multiply(gmm, rows, down_proj, num_rows), plan, top_k_index)
    return combine(rows, plan, top_k_weights).to(hidden_states.dtype)


def grouped_gemm() -> Callable[..., Tensor]:
    """
    `gmm(a, b, batch_sizes, trans_b)` of megablocks.

    Raises:
        ImportError: with the reason, and what to install.
    """
    try:
        ops = importlib.import_module("megablocks.grouped_gemm_util").ops
        if ops is None:
            raise ImportError("No module named 'grouped_gemm'")
    except ImportError as error:
        raise ImportError(
            f"experts_implementation={NAME!r} cannot be used ({error}). It needs a CUDA toolkit and `pip install "
            "--no-deps --no-build-isolation megablocks stanford-stk grouped_gemm`; experts_implementation='modmoe' "
            "needs nothing"
        ) from error
    return ops.gmm


def _check(hidden_states: Tensor, weight: Tensor) -> None:
    for name, tensor in (("hidden_states", hidden_states), ("expert weights", weight)):
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cuda":
            raise RuntimeError(
                f"megablocks multiplies bfloat16 on CUDA alone, but {name} are {tensor.dtype} on {tensor.device}: "
                "use experts_implementation='modmoe'"
            )


def _multiply(gmm: Callable[..., Tensor], rows: Tensor, weight: Tensor, num_rows: Tensor) -> Tensor:
    """
    Sorted rows (S, in) times the weight (E, out, in) of their expert -> (S, out), zeros where there is no expert.

    megablocks leaves rows past the last expert's uninitialised, in the result and in gradients: they stay outside.
    """
    total = int(num_rows.sum())
    transposed = weight.is_contiguous()
    out = gmm(rows[:total].contiguous(), weight if transposed else weight.mT, num_rows, trans_b=transposed)
    return F.pad(out, (0, 0, 0, len(rows) - total))


ExpertsInterface.register(NAME, megablocks_experts_forward)
