"""Pure loss functions; nothing here keeps state."""

from modmoe.losses.cross_entropy import causal_lm_loss
from modmoe.losses.router import RouterLosses, RouterStatistics, router_losses

__all__ = ["RouterLosses", "RouterStatistics", "causal_lm_loss", "router_losses"]
