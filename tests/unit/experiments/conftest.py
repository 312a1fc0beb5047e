"""experiments/ is no package: its programs find their parts beside themselves, and so must the tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "experiments"))  # last: tools/ has an extend.py too
