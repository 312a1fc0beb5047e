"""Import before torch: what c10d prints as C++ stack traces, the check says in a sentence."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
