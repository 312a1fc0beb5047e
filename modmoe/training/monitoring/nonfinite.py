"""Where in a model numbers stop being finite."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


class Finding(NamedTuple):
    """Where a model's numbers stop being finite."""

    forward: bool
    """Whether already in the forward pass."""
    sentence: str


def find_nonfinite(model: nn.Module, batches: Iterable[Batch], device: torch.device, backward: bool) -> Finding | None:
    """
    Run batches once more and name the module where the first number is not finite.

    Collectives inside the model run too, so all ranks call this with equally many batches. Weights, gradients and
    random state stay as they are.

    Args:
        model: a causal LM, as it can be called now (wrapped, if its weights are partitioned).
        batches: with labels, on any device.
        device: of the model.
        backward: whether to search the gradients too, if the forward pass is finite; not possible for weights that
            ZeRO-3 has partitioned.

    Returns:
        the first finding; None if everything is finite.
    """
    search = _Search()
    # Inner modules run before the ones that hold them, so that the first to complain is the innermost.
    hooks = [
        module.register_forward_hook(search.hook(name.removeprefix("module."), module))
        for name, module in model.named_modules()
    ]
    was_training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()  # aux losses over ranks are left out, and nothing is drawn
    try:
        with torch.random.fork_rng(devices), torch.set_grad_enabled(backward):
            for batch in batches:
                inputs = {key: value.to(device) for key, value in batch.items()}
                loss = model(**inputs, use_cache=False).loss
                # Also where something is found already: other ranks may still be searching.
                if search.first_output is not None:
                    # With respect to an inner tensor: no gradient of a parameter is touched, nor an engine's hooks.
                    torch.autograd.grad(loss, search.first_output, allow_unused=True)
                search.first_output = None
    finally:
        for handle in hooks:
            handle.remove()
        model.train(was_training)
    return search.found


class _Search:
    """The first finding, forwards and then backwards."""

    def __init__(self) -> None:
        self.found: Finding | None = None
        self.first_output: torch.Tensor | None = None

    def hook(self, name: str, module: nn.Module) -> Any:
        def check(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if self.found is None and not tensor.isfinite().all():
                    own = [getattr(p, "ds_tensor", p) for p in module.parameters(recurse=False)]
                    sentence = f"the output of {name or 'the model'} is the first that is not finite"
                    if not all(part.isfinite().all() for part in own):
                        sentence += ", and its weights are not finite either"
                    self.found = Finding(True, sentence)
                if tensor.requires_grad:
                    if self.first_output is None:
                        self.first_output = tensor
                    tensor.register_hook(lambda gradient: self._check_gradient(name, gradient))

        return check

    def _check_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.found is None and not gradient.isfinite().all():
            where = f"the gradient at the output of {name or 'the model'} is the first that is not"
            self.found = Finding(False, f"the forward pass is finite; going back, {where}")


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
