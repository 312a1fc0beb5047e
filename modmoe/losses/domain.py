"""Which text the experts of an extension are for.

    L = - sum_n [y_n log(1 - p_n) + (1 - y_n) log p_n]      p_n: share of the null choice; y_n: the text is theirs

The cross entropy teaches a router with a null choice to decline only where its experts do harm. This loss teaches it
to keep them out of all other text. LoRAMoE (arXiv:2312.09979) divides experts by kind of data for the same purpose.
"""

import torch
import torch.nn.functional as F


def domain_loss(logits: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """
    Args:
        logits: (N, 1 + E) of a router, the null choice first.
        inside: (N,) bool, the tokens that the experts are for.

    Returns:
        () fp32 or wider: sum over the tokens, in nats.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    none, some = logits[:, 0], logits[:, 1:].logsumexp(-1)
    # -log sigmoid(x) = softplus(-x), and the odds of using some expert are exp(some - none).
    return F.softplus(torch.where(inside, none - some, some - none)).sum()
