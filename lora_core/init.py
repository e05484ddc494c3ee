"""Starting values of A and B, and what they take out of the base weight.

Sources: LoRA (Hu et al. 2021), PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz 2024). Random draws come in PEFT's order
and, as there, in float32 on the CPU, so equal seeds give equal adapters whatever the base model is.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapter_module import set_parameter
from lora_core.config import LoraConfig
from lora_core.embedding import LoraEmbedding
from lora_core.errors import ConfigError, UnsupportedError
from lora_core.layer import LoraLayer, LoraLinear, RemovedFactors
from lora_core.loftq import loftq
from lora_core.quant import is_quantized

__all__ = ["Start", "gaussian", "initialise", "kaiming", "olora", "orthogonal", "pissa"]


class Start(NamedTuple):
    """Starting values: `lora_A` [R, I], `lora_B` [O, R], and the changed base weight [O, I] or None."""

    lora_A: Tensor
    lora_B: Tensor
    residual: Tensor | None = None


def kaiming(lora_A: Tensor, lora_B: Tensor) -> None:
    """A Kaiming-uniform, B zero, in place: the adapter begins as no change."""
    lora_A.copy_(nn.init.kaiming_uniform_(torch.empty(lora_A.shape), a=math.sqrt(5)))
    nn.init.zeros_(lora_B)


def gaussian(lora_A: Tensor, lora_B: Tensor, rank: int | None = None) -> None:
    """A normal with deviation 1 / rank (A's rows unless it holds several experts'), B zero, in place."""
    lora_A.copy_(nn.init.normal_(torch.empty(lora_A.shape), std=1 / (rank or lora_A.shape[0])))
    nn.init.zeros_(lora_B)


def orthogonal(in_features: int, out_features: int, rank: int) -> Start:
    """A and B with rows from the odd and even rows of one random orthogonal matrix: B·A = 0, yet neither is zero.

    Raises:
        ConfigError: the rank is odd.
    """
    if rank % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {rank} instead.")
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    lora_a = torch.randn(in_features, rank // 2).mm(q[0::2]).T / 10.0
    lora_b = torch.randn(rank // 2, out_features).T.mm(q[1::2]) / 10.0
    return Start(lora_a.contiguous(), lora_b.contiguous())


def pissa(weight: Tensor, rank: int, scaling: float, num_iterations: int | None = None) -> Start:
    """The principal singular triples of the weight; the base keeps the rest.

    Args:
        weight: [O, I], float32.
        num_iterations: None for an exact SVD, else subspace iterations of a randomised one.
    """
    if num_iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=num_iterations)
        vh = v.T
    root = (s / scaling).sqrt()
    lora_a, lora_b = root[:, None] * vh, u * root
    return Start(lora_a, lora_b, weight - scaling * (lora_b @ lora_a))


def olora(weight: Tensor, rank: int, scaling: float) -> Start:
    """The first columns of Q and rows of R of the weight's QR decomposition; the base keeps the rest.

    Args:
        weight: [O, I], float32.
    """
    q, r = torch.linalg.qr(weight)
    lora_a, lora_b = r[:rank].contiguous(), q[:, :rank].contiguous()
    return Start(lora_a, lora_b, weight - scaling * (lora_b @ lora_a))


def initialise(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """Give a new adapter of a layer its starting values, as `config.init_lora_weights` says.

    Those that take something out of the base weight change it, as in PEFT. A quantized one stays as it is, as what was
    taken out cannot be written back without loss: the layer subtracts it (PEFT has no PiSSA there, and quantizes again
    for OLoRA). So the adapter can be converted exactly, and others share the base.
    Embeddings always begin with A zero and B normal, whatever is asked for, as in PEFT.

    Raises:
        ConfigError: the initialisation does not exist for this kind of layer.
        UnsupportedError: it needs data.
    """
    init = config.init_lora_weights
    method = init.lower() if isinstance(init, str) else "kaiming" if init else "none"
    part, scaling = layer.tensors(name), layer.scaling[name]
    with torch.no_grad():
        if isinstance(layer, LoraEmbedding):
            if method != "none":
                nn.init.zeros_(part.lora_A)
                part.lora_B.copy_(nn.init.normal_(torch.empty(part.lora_B.shape)))
        elif method in ("kaiming", "gaussian"):
            (kaiming if method == "kaiming" else gaussian)(part.lora_A, part.lora_B)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif method != "none":
            if not isinstance(layer, LoraLinear):
                raise ConfigError(f"Unknown initialization init_lora_weights={init!r} for a {type(layer).__name__}")
            start = _start(layer, method, part.rank, scaling, config)
            # Rows beyond the singular values stay zero; PEFT makes A and B smaller than the config says.
            part.lora_A.zero_()[: start.lora_A.shape[0]] = start.lora_A
            part.lora_B.zero_()[:, : start.lora_B.shape[1]] = start.lora_B
            if is_quantized(layer.base_layer) and method != "loftq" and start.residual is not None:
                layer.removed[name] = RemovedFactors(part.lora_A.clone(), part.lora_B.clone())
            elif start.residual is not None:
                _change_base(layer, start.residual)
        layer.reset_magnitude(name)


def _start(layer: LoraLinear, method: str, rank: int, scaling: float, config: LoraConfig) -> Start:
    if method == "orthogonal":
        return orthogonal(layer.in_features, layer.out_features, rank)
    weight = layer.matrix().detach().float()
    if method == "pissa":
        return pissa(weight, rank, scaling)
    if method.startswith("pissa_niter_") and method[12:].isdecimal():
        return pissa(weight, rank, scaling, int(method[12:]))
    if method == "olora":
        return olora(weight, rank, scaling)
    if method == "loftq" and config.loftq_config is not None:
        found = loftq(weight, config.loftq_config.loftq_bits, rank, scaling, config.loftq_config.loftq_iter)
        return Start(found.lora_A, found.lora_B, found.quantized)
    raise UnsupportedError(
        f"init_lora_weights={config.init_lora_weights!r} is computed from data: adapters that were made so can be "
        "loaded, new ones are made with PEFT"
    )


def _change_base(layer: LoraLayer, matrix: Tensor) -> None:
    """In place, so that whoever shares the weight sees it; a quantized weight is replaced."""
    new = layer.stored(matrix)
    if is_quantized(layer.base_layer):
        set_parameter(layer.base_layer, "weight", new)
    else:
        layer.weight.data.copy_(new)
