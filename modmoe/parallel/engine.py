"""What DeepSpeed must know of expert parallelism: its process groups, and which parameters belong to which.

DeepSpeed reduces, shards and clips the gradients of experts apart from the others if it finds a module of its own
expert-parallel type. `AutoEPMoELayer` is the one type that ZeRO accepts at every stage, so the model carries a hidden
one without parameters; what is true of the parameters stands on these themselves. Relies on DeepSpeed 0.19.
"""

import os
from functools import cache
from typing import Any

import deepspeed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from modmoe.models import ModMoEPreTrainedModel
from modmoe.parallel.layout import expert_slice
from modmoe.parallel.topology import Topology, topology


def group_name(size: int) -> str:
    """DeepSpeed's name of the expert-parallel groups of this size."""
    return f"ep_size_{size}"


@cache
def expert_parallel_topology(size: int) -> Topology:
    """
    The group of `size` neighbouring ranks that this process belongs to; made on the first call, on all ranks.

    Neighbouring ranks are on one node, where there are enough: tokens then do not leave it. Where there are not, the
    launcher says how many processes a node has.
    """
    deepspeed.init_distributed()  # takes over the process group of PyTorch
    if group_name(size) not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    # The names of torchrun's and of DeepSpeed's launcher.
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    return topology(groups._get_expert_parallel_group(group_name(size)), node_size)


def announce(model: ModMoEPreTrainedModel, size: int, zero_stage: int | None) -> None:
    """
    Tell DeepSpeed about a model that `parallelize` has cut. Call before the optimizer is made.

    Args:
        model: cut along `expert_parallel_topology(size)`; it is known which of its parameters are trained.
        size: of that group.
        zero_stage: of the engine to come.
    """
    experts = [parameter for parameter in model.parameters() if expert_slice(parameter) is not None]
    for parameter in experts:
        _mark(parameter, group_name(size))
    # Stage 3 cuts up frozen experts too; the stages before it insist on a parameter group of experts.
    if zero_stage == 3 or any(parameter.requires_grad for parameter in experts):
        model.add_module("_expert_parallel", _Marker(max(router.num_experts for router, _ in model.routed_pools())))


def _mark(parameter: Any, name: str) -> None:
    parameter.allreduce = False
    parameter.group_name = name
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = name


class _Marker(AutoEPMoELayer):
    """Makes DeepSpeed see a mixture of experts; computes nothing."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """The groups exist already."""
