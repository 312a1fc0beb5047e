"""The only entry point to kernels: stick-breaking attention, routing and grouped linear maps as plain torch ops.

Each op has a slow reference, a fast implementation in PyTorch, a fake (shape) function and gradients, and can be
taken from here into any other PyTorch model. Nothing here depends on transformers.
"""

from .backend import BACKENDS, use_backend
from .grouped_linear import grouped_linear
from .paged import stickbreaking_paged_attention
from .routing import DispatchPlan, Routing, dispatch_plan, route
from .stickbreaking import stickbreaking_attention

__all__ = [
    "BACKENDS",
    "DispatchPlan",
    "Routing",
    "dispatch_plan",
    "grouped_linear",
    "route",
    "stickbreaking_attention",
    "stickbreaking_paged_attention",
    "use_backend",
]
