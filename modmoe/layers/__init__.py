"""Building blocks of the model: routers and pools of experts."""
