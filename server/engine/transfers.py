"""Small tensors between host and device without waiting: pageable memory would have every copy wait for the stream."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fetch", "upload"]


def upload(values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers on the host as a tensor on the device, behind what the device has been given already."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Fetch:
    """A tensor on its way to the host: the copy begins now, and `tolist` waits for it alone."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._has_arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._has_arrived = torch.cuda.Event()
            self._has_arrived.record()

    def tolist(self) -> Any:
        if self._has_arrived is not None:
            self._has_arrived.synchronize()
        return self._host.tolist()
