"""PEFT's functions that make a LoraModel, or change a model without one around it."""

from torch import nn

from lora_core.config import LoraConfig
from lora_core.model import LoraModel
from lora_core.state import INJECTED

__all__ = ["get_peft_model", "inject_adapter_in_model"]


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> LoraModel:
    """`model` with a new adapter, active and trainable; the model itself is changed in place."""
    return LoraModel(model, peft_config, adapter_name)


def inject_adapter_in_model(peft_config: LoraConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Add an adapter to a model and return the model itself, without a wrapper around it; the adapter is active.

    Called again it adds another adapter, inactive. `get_peft_model_state_dict` and `set_peft_model_state_dict` take
    the model.
    """
    lora: LoraModel | None = vars(model).get(INJECTED)
    if lora is None:
        vars(model)[INJECTED] = LoraModel(model, peft_config, adapter_name)
    else:
        lora.add_adapter(adapter_name, peft_config)
    return model
