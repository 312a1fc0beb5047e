"""Building blocks of the model: routers, pools of experts, attention.

Importing it registers our functions in the attention and experts interfaces of transformers.
"""

from . import grouped_experts, megablocks, stickbreaking  # noqa: F401  (they register themselves)
