"""Training on the Hugging Face Trainer and DeepSpeed: run configs, trainer, checkpoints, reports."""
