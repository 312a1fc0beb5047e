"""The Triton kernels: run by Triton's interpreter against the float64 reference, and compiled without a GPU.

The checks run in processes of their own (triton_worker.py), because a process that has imported Triton can only
interpret or only compile, and other tests of this one may import it too.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modmoe.ops import reference, stickbreaking_triton
from tests.unit.ops.triton_worker import Worker

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "stickbreaking"
NAMES = ("out", "remainder", "dq", "dk", "dv")
# Relative L2 error against float64 from the same rounded inputs; the remainder is compared absolutely.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
MASKS = ("none", "key_mask", "documents", "both")


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.inputs = inputs
        return stickbreaking_triton.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, drem: Tensor) -> tuple[Tensor | None, ...]:
        return *stickbreaking_triton.backward(dout, drem, *ctx.inputs), None, None, None, None, None


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, masks: str = "none", size: float = 1.5
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Leaves q, k, v for (batch, query heads, key/value heads, queries, keys, head dim), and masks."""
    batch, heads, kv_heads, num_queries, num_keys, dim = shape
    torch.manual_seed(0)
    sizes = [(heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys)]
    leaves = [torch.randn(batch, h, t, dim, dtype=torch.float64).mul(size).to(dtype) for h, t in sizes]
    key_mask, start = torch.rand(batch, num_keys) > 0.3, torch.randint(0, num_keys + 1, (batch, num_queries))
    key_mask[: batch // 2] = False  # a row of which nothing is left, but not the only one
    return [x.requires_grad_() for x in leaves], {
        "key_mask": key_mask if masks in ("key_mask", "both") else None,
        "document_start": start.sort(1).values if masks in ("documents", "both") else None,
    }


def attend(
    leaves: list[Tensor],
    masks: dict[str, Tensor | None],
    attend_current: bool = True,
    early_stop: bool = True,
) -> tuple[Tensor, Tensor]:
    out, remainder = Attention.apply(
        *leaves, masks["key_mask"], masks["document_start"], leaves[0].shape[-1] ** -0.5, attend_current, early_stop
    )
    return out, remainder


def results(out: Tensor, remainder: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Out, remainder and the gradients of a loss of both."""
    torch.manual_seed(1)
    dout, drem = torch.randn(out.shape).to(out.dtype), torch.randn(remainder.shape).to(remainder.dtype)
    grads = torch.autograd.grad((out * dout).sum() + (remainder * drem).sum(), leaves, materialize_grads=True)
    return [out.detach(), remainder.detach(), *grads]


def expected_results(
    leaves: list[Tensor], masks: dict[str, Tensor | None], attend_current: bool = True
) -> list[Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out, remainder, _ = reference.stickbreaking_attention(
        *doubles, leaves[0].shape[-1] ** -0.5, attend_current, **masks
    )
    return results(out, remainder, doubles)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES[: len(expected)], actual, expected, strict=True):
        error = (a.double() - b).abs().max() if name == "remainder" else (a.double() - b).norm() / b.norm()
        assert error.nan_to_num(0) <= tolerance, f"{name}: error {error:.1e}"
        assert a.isfinite().all(), name


def check_against_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, attend_current: bool, masks: str, early_stop: bool
) -> None:
    leaves, limits = make(shape, dtype, masks)
    actual = results(*attend(leaves, limits, attend_current, early_stop), leaves)
    assert actual[0].dtype == dtype
    assert_close(actual, expected_results(leaves, limits, attend_current), TOLERANCE[dtype])


SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 2, 1, 37, 37, 24),
    (1, 3, 1, 20, 77, 16),
    (1, 2, 2, 35, 35, 64),
    (2, 3, 1, 5, 70, 20),
]
# Each shape with all masks, and all masks with both forms and with early stop on and off.
CASES = [
    (shape, masks, (i + j) % 2 == 0, (i // 2 + j) % 2 == 0)
    for i, shape in enumerate(SHAPES)
    for j, masks in enumerate(MASKS)
]


@pytest.mark.parametrize(("shape", "masks", "attend_current", "early_stop"), CASES, ids=str)
def test_against_the_reference(
    interpreter: Worker, shape: tuple[int, ...], masks: str, attend_current: bool, early_stop: bool
) -> None:
    interpreter(check_against_the_reference, shape, torch.float32, attend_current, masks, early_stop)


@pytest.mark.parametrize("masks", ["none", "both"])
def test_half_precision(interpreter: Worker, masks: str) -> None:
    interpreter(check_against_the_reference, (2, 2, 1, 70, 70, 64), torch.float16, True, masks, True)


def check_chunks() -> None:
    with mock.patch.multiple(stickbreaking_triton, _CHUNK_BLOCKS=1, _CHUNK_BLOCKS_PER_HEAD=2):
        check_against_the_reference((1, 3, 1, 30, 41, 16), torch.float32, False, "documents", True)


def test_backward_in_chunks(interpreter: Worker) -> None:
    interpreter(check_chunks)


def check_golden(case: str, form: str, device: str = "cpu") -> None:
    golden = load_file(GOLDEN / case / "golden.safetensors", device=device)
    tolerances = json.loads((GOLDEN / case / "meta.json").read_text())["tolerances"]
    packed = "cu_seqlens" in golden  # that case is stored without a batch dim
    q, k, v, dout, drem = (golden[name][None] if packed else golden[name] for name in ("q", "k", "v", "do", "drem"))
    start = None
    if packed:
        boundaries = golden["cu_seqlens"].long()
        start = boundaries[:-1].repeat_interleave(boundaries.diff())[None]
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    out, rem = attend(leaves, {"key_mask": None, "document_start": start}, form == "current")
    losses = {
        "out_rem": (out * dout).sum() + (rem * drem).sum(),
        "out_only": (out * dout).sum(),
        "out_plus_rem_v": ((out + rem[..., None] * leaves[2]) * dout).sum(),
    }
    actual = {"out": out, "rem": rem}
    for objective, loss in losses.items():
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        actual |= {f"{objective}.d{name}": grad for name, grad in zip("qkv", grads, strict=True)}
    for name, value in actual.items():
        expected = golden[f"{form}.f64.{name}"]
        # Three times the tolerance, for the one case that is made to break blocked kernels.
        atol = tolerances[name]["atol_float32"] * (3 if case == "extreme_x50" else 1)
        error = (value.detach().double() - (expected[None] if packed else expected)).abs().max()
        assert error <= atol, f"{name}: error {error:.1e}, at most {atol:.1e}"


@pytest.mark.parametrize("form", ["strict", "current"])
@pytest.mark.parametrize(
    "case",
    [
        "dense_t1",
        "extreme_x50",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("dense_small", "dense_t128", "varlen")),
    ],
)
def test_recorded_numbers(interpreter: Worker, case: str, form: str) -> None:
    interpreter(check_golden, case, form)


def check_strides() -> None:
    leaves, limits = make((2, 4, 2, 9, 20, 16))
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves[:2]]
    strided.append(leaves[2].detach().mT.contiguous().mT.requires_grad_())
    assert not any(x.is_contiguous() for x in strided)
    expected, _ = attend(leaves, limits)
    out, _ = attend(strided, limits)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    out.sum().backward()  # a gradient of stride 0
    assert all(torch.equal(a.grad, b) for a, b in zip(strided, grads, strict=True))


def test_strided_inputs_and_stride_zero_gradients(interpreter: Worker) -> None:
    interpreter(check_strides)


def check_early_stop(num_queries: int) -> None:
    """Keys that nobody reads may hold anything."""
    with mock.patch.object(stickbreaking_triton, "_multiprocessors", return_value=1):
        leaves, limits = make((1, 1, 1, num_queries, 500, 32), size=3.0)
        expected = expected_results(leaves, limits)
        with torch.no_grad():
            for x in leaves[1:]:
                x[:, :, :100] = torch.nan
        assert_close(results(*attend(leaves, limits), leaves), expected, 2e-6)
        assert attend(leaves, limits, early_stop=False)[0].isnan().all()


@pytest.mark.parametrize("num_queries", [20, 2])
def test_early_stop_leaves_old_keys_alone(interpreter: Worker, num_queries: int) -> None:
    interpreter(check_early_stop, num_queries)


def check_documents() -> None:
    """Keys before all documents are not read, and a block of queries may read less than those around it."""
    leaves, limits = make((1, 1, 1, 60, 200, 16))
    start = torch.full((1, 60), 70)
    start[:, 20:50] = 170
    limits["document_start"] = start
    expected = expected_results(leaves, limits)
    with torch.no_grad():
        for x in leaves[1:]:
            x[:, :, :60] = torch.nan
    assert_close(results(*attend(leaves, limits, early_stop=False), leaves), expected, 2e-6)


def test_keys_before_the_documents_are_left_alone(interpreter: Worker) -> None:
    interpreter(check_documents)


def check_splits(early_stop: bool, bias: float) -> None:
    """New queries against a cache, with the keys split: as many launches and splits as said, and the full result."""
    with mock.patch.object(stickbreaking_triton, "_multiprocessors", return_value=1):
        leaves, limits = make((2, 4, 1, 3, 500, 16), masks="key_mask")
        limits["key_mask"][0, 250:] = True
        with torch.no_grad():  # `bias` on all logits
            leaves[0][..., 0] = 4.0
            leaves[1][..., 0] = bias
        plan = stickbreaking_triton._split_keys(leaves[0], 2, 16, early_stop)
        assert plan == ([(0, 4, 2), (4, stickbreaking_triton._ALL, 2)] if early_stop else [(0, 2**30, 2)])
        out, remainder = attend(leaves, limits, early_stop=early_stop)
        expected = expected_results(leaves, limits)
        assert (expected[1].max() < 1e-9) == (bias == 0)
        assert (out - expected[0]).norm() <= 2e-6 * expected[0].norm()
        assert (remainder - expected[1]).abs().max() <= 2e-6


@pytest.mark.parametrize("bias", [-6.0, 0.0], ids=["sticks left", "sticks used up"])
@pytest.mark.parametrize("early_stop", [True, False])
def test_split_keys(interpreter: Worker, early_stop: bool, bias: float) -> None:
    interpreter(check_splits, early_stop, bias)


def check_parts(dtype: torch.dtype, size: float) -> None:
    """Sums along keys from numbers cut in parts, as on a device; there in bf16, which the interpreter cannot do."""
    import triton.language as tl

    from modmoe.ops import stickbreaking_triton_kernels

    leaves, limits = make((1, 1, 1, 60, 60, 16), dtype, size=size)
    whole = results(*attend(leaves, limits), leaves)
    with mock.patch.object(stickbreaking_triton_kernels, "_PART", tl.constexpr(tl.float16)):
        cut = results(*attend(leaves, limits), leaves)
    assert not all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert_close(cut, expected_results(leaves, limits), TOLERANCE[dtype])


@pytest.mark.parametrize("size", [0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_parts(interpreter: Worker, dtype: torch.dtype, size: float) -> None:
    interpreter(check_parts, dtype, size)


def check_lengths(
    dtype: torch.dtype, num_queries: int, attend_current: bool, masks: str, tolerance: float | None = None
) -> None:
    lengths = torch.tensor([num_queries, 133, 300])
    leaves, limits = make((3, 4, 2, num_queries, 300, 32), dtype, masks)
    q, k, v = (x.detach() for x in leaves)
    for x in (k, v):
        for row, length in zip(x, lengths, strict=True):
            row[:, length:] = torch.nan
    options = (*limits.values(), 32**-0.5, attend_current)
    expected = reference.stickbreaking_attention(
        *(x.double() for x in (q, k, v)), 32**-0.5, attend_current, **limits, lengths=lengths
    )
    actual = stickbreaking_triton.forward(q, k, v, *options, True, lengths)
    assert_close(list(actual), list(expected[:2]), tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize(("dtype", "num_queries"), [(torch.float32, 1), (torch.float16, 3), (torch.float32, 40)])
def test_sequences_of_different_lengths(
    interpreter: Worker, dtype: torch.dtype, num_queries: int, attend_current: bool, masks: str
) -> None:
    interpreter(check_lengths, dtype, num_queries, attend_current, masks)


def check_small_sigmoids(dtype: torch.dtype, tolerance: float = 1e-5) -> None:
    """Keys of which each takes 1e-4 of the stick: a log or a product that rounds small terms away shows here."""
    num_keys = 8192
    q = torch.ones(1, 1, 1, 64, dtype=dtype)
    k = torch.full((1, 1, num_keys, 64), -9.25 / 8, dtype=dtype)
    _, remainder = stickbreaking_triton.forward(q, k, torch.ones_like(k), None, None, 1 / 8, True, False)
    truth = torch.sigmoid(torch.tensor(9.25, dtype=torch.float64)) ** num_keys
    assert abs(remainder.item() / truth.item() - 1) <= tolerance


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_small_sigmoids_add_up(interpreter: Worker, dtype: torch.dtype) -> None:
    interpreter(check_small_sigmoids, dtype)


def check_nan() -> None:
    leaves, limits = make((1, 1, 1, 20, 20, 16))
    with torch.no_grad():
        leaves[0][0, 0, 7, 3] = torch.nan
    out, remainder = attend(leaves, limits)
    assert out[0, 0, 7].isnan().all()
    assert remainder[0, 0, 7].isnan()
    assert out.isnan().sum() == 16


def test_nan_stays_nan(interpreter: Worker) -> None:
    interpreter(check_nan)


def check_empty() -> None:
    leaves, limits = make((0, 4, 2, 3, 5, 16))
    assert [x.shape for x in results(*attend(leaves, limits), leaves)][:2] == [(0, 4, 3, 16), (0, 4, 3)]


def test_empty_batch(interpreter: Worker) -> None:
    interpreter(check_empty)


def check_problems() -> None:
    def problem(dtype: torch.dtype, dim: int = 16) -> str | None:
        x = torch.zeros(1, 1, 1, dim, dtype=dtype)
        return stickbreaking_triton.problem(x)

    assert problem(torch.float32) is None
    assert problem(torch.float16, 256) is None
    assert problem(torch.float64) == "it has no torch.float64"
    assert problem(torch.bfloat16) == "triton's interpreter gets torch.bfloat16 wrong"
    assert problem(torch.float32, 257) == "it has head dims up to 256, got 257"


def test_problems(interpreter: Worker) -> None:
    interpreter(check_problems)
    x = torch.zeros(1, 1, 1, 16)
    with mock.patch.dict("os.environ"):
        stickbreaking_triton.os.environ.pop("TRITON_INTERPRET", None)
        assert stickbreaking_triton.problem(x) == "it is for CUDA devices, the tensors are on 'cpu'"


class AllocatedBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += result.nbytes if isinstance(result, Tensor) else 0
        return result


def test_memory_grows_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launching code allocates; the kernels themselves allocate nothing and are left out."""

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    names = ("forward_kernel", "combine_kernel", "backward_rows_kernel", "backward_keys_kernel")
    kernels = SimpleNamespace(**{name: Kernel() for name in names})
    monkeypatch.setitem(sys.modules, "modmoe.ops.stickbreaking_triton_kernels", kernels)
    totals = []
    for length in (4096, 16384):
        q = torch.empty(2, 16, length, 64, dtype=torch.bfloat16)
        k = torch.empty(2, 8, length, 64, dtype=torch.bfloat16)
        options = (None, None, 0.1, True, True)
        with AllocatedBytes() as allocated:
            out, remainder = stickbreaking_triton.forward(q, k, k, *options)
            stickbreaking_triton.backward(out, remainder, q, k, k, *options)
        totals.append(allocated.total)
    assert totals[1] <= 4 * totals[0]
    assert totals[1] < 16 * q.nbytes  # of the matrix of logits: 32 * 16384 ** 2 * 2


def compile_kernels(
    capability: int, dtype: torch.dtype, dim: int, num_queries: int, masks: str, num_keys: int = 512
) -> list[dict[str, Any]]:
    """Compile what `forward` (and `backward`) would launch on such a device, and say what the machine code uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    compile_and_run, compiled = triton.JITFunction.run, []

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [binaries / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        compiled.append(
            {
                "kernel": self.__name__,
                "code": kernel.hash,
                "registers": registers,
                "stack": stack,
                "shared": kernel.metadata.shared,
                "products": len(re.findall("mma.sync|wgmma.mma_async", kernel.asm["ptx"])),
                "ahead": kernel.asm["ttgir"].count("ttg.async_copy_global_to_local"),
            }
        )

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # what was compiled is remembered per device
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(type(driver), "active", device),
        mock.patch.object(triton.JITFunction, "run", only_compile),
    ):
        leaves, limits = make((1, 4, 2, num_queries, num_keys, dim), dtype, masks)
        options = (limits["key_mask"], limits["document_start"], 0.1, True, True)
        with torch.no_grad():
            out, remainder = stickbreaking_triton.forward(*leaves, *options)
            if num_queries > 16:
                stickbreaking_triton.backward(out, remainder, *leaves, *options)
    return compiled


def case(
    capability: int, dtype: torch.dtype, dim: int, num_queries: int, masks: str, stack: int, slow: bool = True
) -> Any:
    marks = [pytest.mark.slow] if slow else []
    name = f"sm_{capability}-{dtype}-{dim}-{num_queries}-{masks}"
    return pytest.param(capability, dtype, dim, num_queries, masks, stack, marks=marks, id=name)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "num_queries", "masks", "stack"),
    [
        case(90, torch.bfloat16, 64, 512, "none", 64),
        case(80, torch.float16, 48, 512, "both", 128, slow=False),
        case(90, torch.bfloat16, 64, 1, "none", 0, slow=False),
        case(80, torch.bfloat16, 64, 512, "none", 128),
        case(90, torch.bfloat16, 128, 512, "none", 0),
        case(80, torch.bfloat16, 128, 512, "none", 0),
        case(90, torch.bfloat16, 256, 512, "none", 256),
        case(80, torch.bfloat16, 256, 512, "none", 256),
        case(90, torch.bfloat16, 128, 1, "none", 64),
        case(80, torch.float32, 64, 512, "none", 64),
        case(90, torch.float32, 64, 512, "both", 512),
        case(80, torch.float32, 128, 512, "none", 1024),
        case(90, torch.float32, 256, 512, "none", 4096),
    ],
)
def test_compiles_without_a_gpu(
    compiler: Worker, capability: int, dtype: torch.dtype, dim: int, num_queries: int, masks: str, stack: int
) -> None:
    """`stack`: a ceiling on the bytes of registers that spill, per thread."""
    kernels = compiler(compile_kernels, capability, dtype, dim, num_queries, masks)
    names = [k["kernel"] for k in kernels]
    if num_queries == 1:
        assert names == ["forward_kernel", "combine_kernel"]
    else:
        assert names == ["forward_kernel", "backward_rows_kernel", "backward_keys_kernel"]
    for kernel in kernels:
        print(kernel)
        assert kernel["stack"] <= stack, kernel
        # What one block may have on every device of compute capability 8.0 or more.
        assert kernel["shared"] <= 99 * 1024, kernel
        if kernel["kernel"] != "combine_kernel":
            assert kernel["products"] > 0, kernel
            assert kernel["ahead"] > 0, kernel


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ((90, torch.bfloat16, 64, "none"), [(1, 512), (1, 499)]),
        ((80, torch.float16, 48, "both"), [(512, 512), (507, 509)]),
    ],
    ids=["decoding", "training"],
)
def test_the_same_machine_code_for_all_lengths(
    compiler: Worker, options: tuple[int, torch.dtype, int, str], lengths: list[tuple[int, int]]
) -> None:
    """Of (queries, keys): one that is no multiple of 16 must not make a reader wait for the compiler."""
    capability, dtype, dim, masks = options
    first, second = (
        [kernel["code"] for kernel in compiler(compile_kernels, capability, dtype, dim, queries, masks, keys)]
        for queries, keys in lengths
    )
    assert first == second
