"""Which workloads `cpu` and `gpu` stand for, and their sizes."""

from collections.abc import Iterator

import torch

from benchmarks import attention, experts, models, products, routing
from benchmarks.workload import Workload

# Tokens, hidden and intermediate size, experts, experts per token, gated.
MOLM_TINY = experts.Shape(1024, 256, 512, 32, 2, gated=False)
COARSE_CPU = experts.Shape(1024, 512, 1024, 8, 2, gated=False)
FINE_GPU = experts.Shape(32768, 1536, 256, 128, 8, gated=True)
COARSE_GPU = experts.Shape(32768, 1024, 2048, 32, 2, gated=False)


def cpu(dtype: torch.dtype) -> Iterator[Workload]:
    """The ops at the size of the tiny MoLM preset, then whole models (in autocast where `dtype` is bfloat16)."""
    device, heads, head_dim = torch.device("cpu"), (4, 2), 64
    for kind in attention.KINDS:
        for length in (1024, 2048, 4096):
            baseline = attention.pytorch(attention.forward_backward)
            yield attention.training(heads, head_dim, length, kind, "cpp", device, dtype, (baseline,))
    for kind in attention.KINDS:
        for cache in (2048, 8192):
            baseline = attention.pytorch(attention.forward_only)
            yield attention.decoding(heads, head_dim, cache, kind, "cpp", device, dtype, (baseline,))
    for shape in (MOLM_TINY, COARSE_CPU):
        yield products.grouped_product(first_product(shape), ("cpp",), device, dtype)
        yield experts.expert_layer(shape, ("cpp",), experts.CPU_IMPLEMENTATIONS, device, dtype)
    for length in (256, 1024, 2048):
        yield models.training(length, bf16=dtype == torch.bfloat16)
    for cache in (256, 2048):
        yield models.decoding(cache, bf16=dtype == torch.bfloat16)


def gpu(device: torch.device, dtype: torch.dtype) -> Iterator[Workload]:
    """Sizes of real models, with every peer that there is."""
    ours = ("cuda", "cuda_sm90")
    for shape in (FINE_GPU, COARSE_GPU):
        yield products.grouped_product(first_product(shape), ours, device, dtype)
        yield experts.expert_layer(shape, ours, experts.GPU_IMPLEMENTATIONS, device, dtype, (experts.scattermoe(),))
        yield routing.routing(shape, ("torch", *ours), device, dtype)
    for head_dim in (64, 128):
        heads = (2048 // head_dim, 2048 // head_dim)  # as many of both: the public kernel has no groups
        for length in (4096, 8192, 16384):
            for kind in attention.KINDS:
                peers = (attention.public_triton(), *attention.softmax_training())
                yield attention.training(heads, head_dim, length, kind, "triton", device, dtype, peers)
        for kind in attention.KINDS:
            baseline = attention.pytorch(attention.forward_only)
            yield attention.decoding(heads, head_dim, 32768, kind, "triton", device, dtype, (baseline,))


def first_product(shape: experts.Shape) -> products.Shape:
    """Of the layer; the second has the widths the other way round."""
    return products.Shape(shape.tokens * shape.top_k, shape.hidden, shape.up_size, shape.experts)
