"""Root mean square norms (Zhang & Sennrich 2019) in one operation, which take the place of a model's own."""

from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.native.small import native_rms_norm

__all__ = ["RmsNorm"]


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    @classmethod
    def like(cls, module: nn.Module | None) -> "RmsNorm | None":
        """One with the parameters of a module that may be such a norm; whether it is shows in what both make."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        parameters = {} if module is None else dict(module.named_parameters())
        if not isinstance(eps, float) or list(parameters) != ["weight"] or parameters["weight"].ndim != 1:
            return None
        return cls(parameters["weight"], eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        own = native_rms_norm(hidden_states, self.weight, self.eps)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps) if own is None else own
