"""
Import before torch: how long OpenMP threads spin at a barrier before they sleep.

The default of libgomp is so long that on a machine where anything else runs, threads spend their time slices waiting
for one that has no core, and training becomes ten times slower or worse. A short spin costs about a tenth on an idle
machine.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
