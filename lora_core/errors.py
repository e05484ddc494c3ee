"""Errors of lora_core.

All are LoraErrors, and so ValueErrors, as PEFT's are. `code` is stable and safe to match on; the text is for people.
"""

__all__ = [
    "AdapterNotFoundError",
    "CheckpointError",
    "ConfigError",
    "LoraError",
    "TargetError",
    "UnsupportedError",
]


class LoraError(ValueError):
    """Base of every error this package raises on purpose."""

    code = "adapter_invalid"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ConfigError(LoraError):
    """A configuration value is wrong."""

    code = "adapter_config_invalid"


class CheckpointError(LoraError):
    """A file is not what it claims to be."""

    code = "adapter_file_invalid"


class TargetError(LoraError):
    """Configuration or tensors do not fit the base model."""

    code = "adapter_mismatch"


class UnsupportedError(LoraError):
    """Understood, and refused by name."""

    code = "adapter_unsupported"


class AdapterNotFoundError(LoraError):
    """There is no adapter of that name, or in that slot."""

    code = "adapter_not_found"
