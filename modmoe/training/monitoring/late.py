"""Numbers that travel from the device to the host while both go on working."""

import torch


class Late:
    """
    A copy of a small tensor, to be read later without waiting for what the device was given in the meantime.

    Args:
        tensor: any shape, on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def tolist(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
