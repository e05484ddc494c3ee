"""LoRA and DoRA adapters on one base model: injection, routing per row, PEFT's names and files."""

from lora_core.checkpoint import load_adapter, parse_adapter, save_adapter
from lora_core.config import LoftQConfig, LoraConfig
from lora_core.convert import convert_to_lora, simplify_adapter
from lora_core.device_bank import DeviceModelSlots, attach_slots, flatten_parts
from lora_core.errors import (
    AdapterNotFoundError,
    CheckpointError,
    ConfigError,
    LoraError,
    TargetError,
    UnsupportedError,
)
from lora_core.functions import get_peft_model, inject_adapter_in_model
from lora_core.layer import LoraLinear
from lora_core.ledger import TensorGroup, TensorLedger
from lora_core.loftq_replace import replace_lora_weights_loftq
from lora_core.model import LoraModel
from lora_core.ops import apply_lora
from lora_core.quant import prepare_model_for_kbit_training
from lora_core.routing import Key, Route, Router, Run
from lora_core.serving import ModelSlots, Part, fold_adapter, wrap_linears
from lora_core.slots import LayerSlots, SlotBank
from lora_core.state import get_peft_model_state_dict, set_peft_model_state_dict
from lora_core.targets import resolve_targets
from lora_core.weights import AdapterWeights, LoraTensors

__all__ = [
    "AdapterNotFoundError",
    "AdapterWeights",
    "CheckpointError",
    "ConfigError",
    "DeviceModelSlots",
    "Key",
    "LayerSlots",
    "LoftQConfig",
    "LoraConfig",
    "LoraError",
    "LoraLinear",
    "LoraModel",
    "LoraTensors",
    "ModelSlots",
    "Part",
    "Route",
    "Router",
    "Run",
    "SlotBank",
    "TargetError",
    "TensorGroup",
    "TensorLedger",
    "UnsupportedError",
    "apply_lora",
    "attach_slots",
    "convert_to_lora",
    "flatten_parts",
    "fold_adapter",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_adapter",
    "parse_adapter",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "resolve_targets",
    "save_adapter",
    "set_peft_model_state_dict",
    "simplify_adapter",
    "wrap_linears",
]
