"""Module-to-module distillation as a run: phases one after another, pairs of stages in parallel."""
