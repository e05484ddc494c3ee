"""Combining several adapters into a new one: task arithmetic, TIES, DARE, magnitude pruning, SVD and concatenation.

Sources: task arithmetic (Ilharco et al. 2023), TIES (Yadav et al. 2023), DARE (Yu et al. 2024). Names, options and the
order of random draws are those of PEFT's `add_weighted_adapter`, so that equal seeds give equal results.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.maths import delta_weight
from lora_core.weights import LoraTensors

__all__ = ["COMBINATION_TYPES", "NEEDS_EQUAL_RANKS", "MixOptions", "MixPart", "combine", "mix_module", "svd_factors"]

COMBINATION_TYPES = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
SVD_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
NEEDS_EQUAL_RANKS = frozenset({"linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MixOptions:
    """How adapters are combined.

    Attributes:
        combination_type: one of `COMBINATION_TYPES`. "cat" and "svd" (at full rank) are the weighted sum of the
            adapters' deltas; the others are approximations that have their own uses.
        svd_rank: rank of the result of the "svd" family; the largest source rank by default.
        svd_clamp: quantile at which the entries of the SVD's factors are clamped, 0 to 1.
        svd_full_matrices, svd_driver: given to `torch.linalg.svd`; a driver is cuSOLVER's, for tensors on CUDA.
        density: share of entries that pruning keeps, 0 to 1; needed by the TIES, DARE and magnitude families. DARE
            divides by it: it must be above 0 there.
        majority_sign_method: TIES elects each entry's sign by the "total" of the values or by their "frequency".

    Raises:
        ConfigError: an option is unknown, missing or out of range.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        if self.combination_type not in COMBINATION_TYPES:
            raise ConfigError(f"Invalid combination_type: {self.combination_type}")
        if self.needs_density and self.density is None:
            raise ConfigError(f"combination_type {self.combination_type} needs `density`")
        if self.density is not None and not self.density >= 0:
            raise ConfigError(f"Density should be >= 0, got {self.density}")
        if self.density == 0 and self.method.startswith("dare"):
            raise ConfigError("DARE divides by the density: it must be above 0")
        if self.svd_driver not in SVD_DRIVERS:
            raise ConfigError(f"`svd_driver` must be one of {SVD_DRIVERS}, not {self.svd_driver!r}")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ConfigError(f'Unimplemented mask method "{self.majority_sign_method}"')
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"`svd_rank` must be at least 1, not {self.svd_rank}")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ConfigError(f"`svd_clamp` is a quantile from 0 to 1, not {self.svd_clamp}")

    @property
    def needs_density(self) -> bool:
        return self.method not in ("linear", "cat")

    @property
    def is_svd(self) -> bool:
        return self.combination_type == "svd" or self.combination_type.endswith("_svd")

    @property
    def method(self) -> str:
        """How tensors are combined, without what is done to the result."""
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")


@dataclass(frozen=True, slots=True)
class MixPart:
    """One source adapter's part of a module.

    Attributes:
        tensors: its factors.
        delta: [O, I], its whole change of the weight, scaling (and DoRA's gain) included, for the "svd" family; by
            default s·B·A.
    """

    tensors: LoraTensors
    scaling: float
    weight: float
    delta: Tensor | None = None


def mix_module(parts: Sequence[MixPart], options: MixOptions, rank: int, *, transposed: bool = False) -> LoraTensors:
    """Combine the sources' parts of one module into factors A [rank, I] and B [O, rank] whose scaling is 1.

    Only the "svd" family looks at `rank` and at whole deltas.

    Args:
        transposed: the module stores its weight as [I, O] (Conv1D, embeddings): decides the order of random draws.

    Raises:
        ConfigError: an SVD driver without CUDA.
    """
    if options.combination_type == "cat":
        lora_a = torch.cat([part.tensors.lora_A * (part.weight * part.scaling) for part in parts])
        return LoraTensors(lora_a, torch.cat([part.tensors.lora_B for part in parts], dim=1))
    if options.is_svd:
        return _mix_by_svd(parts, options, rank, transposed)
    # Half of each coefficient goes to A and half to B; the sign to A alone.
    scaled = [part.weight * part.scaling for part in parts]
    roots = [math.sqrt(abs(s)) for s in scaled]
    signed = [math.copysign(root, s) for root, s in zip(roots, scaled, strict=True)]
    lora_a = combine([part.tensors.lora_A for part in parts], signed, options)
    return LoraTensors(lora_a, combine([part.tensors.lora_B for part in parts], roots, options))


def combine(tensors: Sequence[Tensor], weights: Sequence[float], options: MixOptions) -> Tensor:
    """Weighted sum of equally shaped tensors after pruning and sign election, as the method says; in their dtype."""
    method = options.method
    if method != "linear":
        assert options.density is not None
        by_chance = method.startswith("dare")
        tensors = [_prune(tensor, options.density, by_chance=by_chance) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, device=stacked.device).view(-1, *[1] * tensors[0].ndim)
    weighted = stacked * factors
    if not method.endswith("ties"):
        return weighted.sum(dim=0).to(stacked.dtype)
    votes = stacked if options.majority_sign_method == "total" else stacked.sign()
    elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return ((weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)).to(stacked.dtype)


def svd_factors(delta: Tensor, rank: int, options: MixOptions | None = None) -> LoraTensors:
    """The best factors of `delta` [O, I] by an SVD: B = U·S, A = Vᵀ; filled up with zeros beyond its own rank.

    Raises:
        ConfigError: an SVD driver without CUDA.
    """
    options = options or MixOptions(svd_full_matrices=False)
    if options.svd_driver is not None and not delta.is_cuda:
        raise ConfigError("`svd_driver` chooses among cuSOLVER's methods: it needs the tensors on CUDA")
    u, s, vh = torch.linalg.svd(_full(delta), full_matrices=options.svd_full_matrices, driver=options.svd_driver)
    lora_b, lora_a = u[:, : min(rank, len(s))] * s[:rank], vh[: min(rank, len(s))]
    if options.svd_clamp is not None:
        lora_a, lora_b = _clamped(lora_a, lora_b, options.svd_clamp)
    return _filled_up(lora_a.to(delta.dtype), lora_b.to(delta.dtype), rank)


def _clamped(lora_a: Tensor, lora_b: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Both cut to ± the quantile of all their entries; sorting finds it, as torch.quantile refuses large tensors."""
    values = torch.cat([lora_b.flatten(), lora_a.flatten()]).sort().values
    place = level * (len(values) - 1)
    below = values[math.floor(place)]
    high = below + (values[math.ceil(place)] - below) * (place - math.floor(place))
    return lora_a.clamp(-high, high), lora_b.clamp(-high, high)


def _mix_by_svd(parts: Sequence[MixPart], options: MixOptions, rank: int, transposed: bool) -> LoraTensors:
    is_low_rank = options.combination_type == "svd" and all(part.delta is None for part in parts)
    if is_low_rank and options.svd_clamp is None and options.svd_driver is None:
        return _svd_of_product(parts, rank)
    deltas = []
    for part in parts:
        delta = part.delta
        if delta is None:
            delta = delta_weight(part.tensors.lora_A, part.tensors.lora_B, part.scaling)
        deltas.append(delta.T if transposed else delta)
    mixed = combine(deltas, [part.weight for part in parts], options)
    return svd_factors(mixed.T if transposed else mixed, rank, options)


def _svd_of_product(parts: Sequence[MixPart], rank: int) -> LoraTensors:
    """The same as `svd_factors` of Σ w·s·B·A, without ever forming it: the SVD of R_B·R_Aᵀ between two QRs."""
    stacked = mix_module(parts, MixOptions(combination_type="cat"), rank)
    q_b, r_b = torch.linalg.qr(_full(stacked.lora_B))
    q_a, r_a = torch.linalg.qr(_full(stacked.lora_A).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    dtype = stacked.lora_A.dtype
    lora_b = (q_b @ u[:, :rank]) * s[:rank]
    return _filled_up((vh[:rank] @ q_a.T).to(dtype), lora_b.to(dtype), rank)


def _full(tensor: Tensor) -> Tensor:
    """LAPACK has no half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _filled_up(lora_a: Tensor, lora_b: Tensor, rank: int) -> LoraTensors:
    missing = rank - lora_a.shape[0]
    if missing > 0:
        lora_a = torch.cat([lora_a, lora_a.new_zeros(missing, lora_a.shape[1])])
        lora_b = torch.cat([lora_b, lora_b.new_zeros(lora_b.shape[0], missing)], dim=1)
    return LoraTensors(lora_a.contiguous(), lora_b.contiguous())


def _prune(tensor: Tensor, density: float, *, by_chance: bool) -> Tensor:
    """Keep a share of the entries: the largest, or random ones rescaled by 1 / density."""
    if density >= 1:
        warnings.warn(f"The density {density} is greater than or equal to 1: nothing is pruned.", stacklevel=2)
        return tensor
    if by_chance:
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view_as(tensor)
