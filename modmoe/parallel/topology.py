"""Which processes hold parts of the experts, and which of them are on one node."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """
    The processes of an expert-parallel group.

    Attributes:
        group: all of them.
        across: those at the same place in each node, in order of nodes; None where rows go straight to their process.
        within: those of this process's node.
    """

    group: dist.ProcessGroup
    across: dist.ProcessGroup | None = None
    within: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()


def topology(group: dist.ProcessGroup, node_size: int) -> Topology:
    """
    Separate the network of a node from that between nodes, where a group lies on several nodes. Collective.

    Rows then first go to the node of their expert, to the process at the sender's own place there, and then on within
    the node: fewer and larger messages between nodes, and both networks work at the same time (FSMoE,
    arXiv:2501.10714).

    Args:
        group: neighbouring ranks.
        node_size: processes on this process's node; 0 if that is not known.
    """
    size = group.size()
    node_sizes = [0] * size
    dist.all_gather_object(node_sizes, node_size, group=group)
    # All must decide alike, and nodes of different sizes have no places in common.
    if len(set(node_sizes)) > 1 or node_size <= 1 or size <= node_size or size % node_size:
        return Topology(group)
    ranks = dist.get_process_group_ranks(group)
    node, place = divmod(group.rank(), node_size)
    across = dist.new_group(ranks[place::node_size], use_local_synchronization=True)
    within = dist.new_group(ranks[node * node_size : (node + 1) * node_size], use_local_synchronization=True)
    return Topology(group, across, within)
