"""Whether a model's files still are the original weights, or quantized ones: by what its folder says of itself."""

import json
from pathlib import Path

from server.errors import InvalidRequestError
from server.gguf import MARK

__all__ = ["GGUF", "quantization_method", "require_unquantized"]

GGUF = "GGUF"


def quantization_method(folder: Path) -> str | None:
    """How a model's files are quantized: "bitsandbytes" or another method's name; None if they are not.

    "GGUF" is that of a folder that was made of a file with rounded weights, or that holds such files only.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):  # whoever reads the model says what is wrong with it
        return GGUF if any(folder.glob("*.gguf")) else None
    if found is None:
        return GGUF if (folder / MARK).is_file() else None
    # Early files of bitsandbytes do not say the method.
    method = str(found.get("quant_method", "bitsandbytes")) if isinstance(found, dict) else "an unknown method"
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def require_unquantized(folder: Path, param: str) -> None:
    """Refuse a folder whose files are not the weights as they were trained.

    Args:
        param: the job's option that names such a folder.

    Raises:
        InvalidRequestError: code `not_supported`.
    """
    method = quantization_method(folder)
    if method is not None:
        raise InvalidRequestError(
            f"this job needs weights in full precision, and these files are quantized by {method}: name the "
            f"unquantized model's folder as `{param}`",
            code="not_supported",
            param=param,
        )
