"""Pure loss functions; nothing here keeps state."""

from modmoe.losses.router import RouterLosses, RouterStatistics, router_losses

__all__ = ["RouterLosses", "RouterStatistics", "router_losses"]
