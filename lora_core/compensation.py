"""What quantization takes from a model, given back by an adapter of low rank.

Of a layer's loss R = W - Q(W), the adapter should keep what matters for the layer's inputs x: the B·A of rank r with
the least E‖(R - B·A)x‖² is the truncated SVD of R·L, divided by L again, where E[x·xᵀ] = L·Lᵀ (as in QERA, Zhang et al.
2024). Without inputs it is the truncated SVD of R itself.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.weights import LoraTensors

__all__ = ["compensate", "each_input"]

DAMPING = 1e-2  # of the mean second moment, added to each: fewer inputs than features say nothing of most directions
MAX_FULL_FEATURES = 4096  # beyond, features are taken as uncorrelated: the moments of 14,336 would take 800 MB
OVERSAMPLING, NUM_ITERATIONS = 16, 4  # of the randomised SVD (Halko et al. 2011)
MIN_RANDOMISED = 8  # times as large as the rank, or an exact SVD is as fast


def compensate(weight: Tensor, quantized: Tensor, rank: int, inputs: Tensor | None = None) -> LoraTensors:
    """The best B·A of rank `rank` for W - Q(W) under such inputs; scaling 1.

    Args:
        weight, quantized: [O, I].
        inputs: [T, I], what the layer sees; None to treat all directions alike.

    Raises:
        ConfigError: the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"`rank` must be at least 1, not {rank}")
    residual = weight.float() - quantized.float()
    if inputs is None:
        return LoraTensors(*_factors(residual, rank))
    x = inputs.float()
    if x.shape[1] > MAX_FULL_FEATURES:
        moments = x.square().mean(0)
        scale = (moments + DAMPING * moments.mean()).sqrt()
        a, b = _factors(residual * scale, rank)
        return LoraTensors(a / scale, b)
    second = x.T @ x / len(x)
    second.diagonal().add_(DAMPING * second.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    lower = torch.linalg.cholesky(second)
    a, b = _factors(residual @ lower, rank)
    return LoraTensors(torch.linalg.solve_triangular(lower, a, upper=False, left=False), b)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of the matrix' truncated SVD, singular values shared evenly; missing rank is zero."""
    if rank * MIN_RANDOMISED < min(matrix.shape):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # the same adapter each time
            u, s, v = torch.svd_lowrank(matrix, rank + OVERSAMPLING, niter=NUM_ITERATIONS)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    a[: len(root)], b[:, : len(root)] = root[:, None] * vh[:rank], u[:, :rank] * root
    return a, b


@contextmanager
def each_input(model: nn.Module, names: Iterable[str], use: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block, what modules are called with is given to `use(name, inputs [T, I])`, and not kept."""
    hooks = []
    for name in names:

        def before(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            use(name, args[0].flatten(0, -2))

        hooks.append(model.get_submodule(name).register_forward_pre_hook(before))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
