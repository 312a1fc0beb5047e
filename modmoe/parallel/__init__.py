"""Expert parallelism, applied to a built model from outside."""
