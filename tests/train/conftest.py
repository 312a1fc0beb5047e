"""Running `train/pretrain.py` as users do, in a process group of its own."""

from tests.launching import CONFIG, SCRIPT, launch, start, workspace

__all__ = ["CONFIG", "SCRIPT", "launch", "start", "workspace"]
