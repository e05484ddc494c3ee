"""What is told of the tensors of a file that was refused before it became an adapter."""

from lora_core.checkpoint import WEIGHTS_NAME, split_key, tensor_faults
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError, LoraError
from lora_core.ledger import NOT_REACHED, TensorGroup
from lora_core.safetensors_header import read_header

__all__ = ["refused_groups"]

# By the names of PEFT's keys, as in the report of an adapter that was read.
SAVED_PARTS = {"bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
ANY = LoraConfig()


def refused_groups(config_json: bytes, weights: bytes, reason: str) -> list[TensorGroup]:
    """The report of a refused adapter's two files: each tensor with its own fault, if it has one.

    Args:
        reason: why the adapter is refused; stands for all tensors if none of them is at fault. A file that is no
            safetensors file is one group with its own fault.
    """
    try:
        header = read_header(memoryview(weights), len(weights))
    except CheckpointError as error:
        return [TensorGroup("file", "refused", str(error), (WEIGHTS_NAME,))]
    config, faults = ANY, {}
    try:
        config = LoraConfig.from_json(config_json)
        faults = tensor_faults(config, header)
    except LoraError:
        pass  # it is the configuration that is wrong, which the reason says
    rest = NOT_REACHED if faults else reason
    found: dict[tuple[str, str], list[str]] = {}
    for key in header:
        try:
            name, part = split_key(config, key)
        except LoraError:
            name, part = key, "other"
        kind = SAVED_PARTS.get(part, part)
        found.setdefault((kind, str(faults[key]) if key in faults else rest), []).append(name)
    return [TensorGroup(kind, "refused", why, tuple(names)) for (kind, why), names in found.items()]
