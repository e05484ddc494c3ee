"""Which GGUF file a `--model` means, and what the file says of itself."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.errors import InvalidRequestError

__all__ = ["MARK", "GgufFacts", "check_packages", "find_gguf", "read_facts"]

SUFFIX = ".gguf"
# In a folder made from a file whose weights are rounded: which file, and to what.
MARK = "gguf.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
NEEDED_PACKAGES = ("gguf", "accelerate")
FLOATING = frozenset({"F32", "F16", "BF16", "F64"})
ROPE_FREQS = "rope_freqs.weight"
# Lists as long as the vocabulary, which transformers reads itself.
LONG_FIELDS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What the engine must know of a file beside its weights.

    Attributes:
        architecture: llama.cpp's name of it.
        metadata: by key, without the vocabulary.
        num_elements: of each tensor, by llama.cpp's name.
        types: in which weights are held, as in "Q4_K".
        rope_freqs: what rotary frequencies are divided by [head_dim / 2], if anything.
    """

    architecture: str
    metadata: Mapping[str, Any]
    num_elements: Mapping[str, int]
    types: frozenset[str]
    rope_freqs: tuple[float, ...] | None = None

    @property
    def own(self) -> dict[str, Any]:
        """The metadata of the architecture, by the rest of the key."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    @property
    def num_parameters(self) -> int:
        return sum(number for name, number in self.num_elements.items() if name != ROPE_FREQS)

    @property
    def rounded(self) -> str | None:
        """The types of weights that are not held in floating point, as in "Q4_K, Q6_K"; None if all are."""
        return ", ".join(sorted(self.types - FLOATING)) or None


def find_gguf(model: str | Path) -> Path | None:
    """The GGUF file that a model's path means: itself, or the only one of a folder without other weights.

    Returns:
        None: it is something else.

    Raises:
        InvalidRequestError: code `model_not_found`, there is no such file; `model_ambiguous`, the folder has several;
            `model_unsupported`, a part of a model in several files.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise InvalidRequestError(f"there is no file {path}", code="model_not_found")
        return _whole(path)
    if not path.is_dir() or any(True for pattern in OTHER_WEIGHTS for _ in path.glob(pattern)):
        return None
    found = sorted(one for one in path.iterdir() if one.suffix.lower() == SUFFIX)
    if len(found) > 1 and not all(SHARD.search(one.name) for one in found):
        raise InvalidRequestError(
            f"{path} holds several GGUF files ({', '.join(one.name for one in found)}): name the one to serve, as in "
            f"`--model {found[0]}`",
            code="model_ambiguous",
        )
    return _whole(found[0]) if found else None


def _whole(path: Path) -> Path:
    if SHARD.search(path.name):
        raise InvalidRequestError(
            f"{path.name} is a part of a model in several files, which is not read: join them with llama.cpp's "
            f"`llama-gguf-split --merge {path.name} whole.gguf`",
            code="model_unsupported",
        )
    return path


def check_packages() -> None:
    """Refuse to go on without the packages that read such files.

    Raises:
        InvalidRequestError: code `quantization_missing`, with what pip installs.
    """
    missing = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise InvalidRequestError(
            f"GGUF files need {' and '.join(missing)}: pip install 'loramux[gguf]'", code="quantization_missing"
        )


def read_facts(file: Path) -> GgufFacts:
    """Read what is in a file beside weights.

    Raises:
        InvalidRequestError: `quantization_missing`, or `model_unsupported`: it is no GGUF file, or a broken one.
    """
    check_packages()
    import gguf  # noqa: PLC0415 - optional

    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items() if key not in LONG_FIELDS}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        freqs = tensors.get(ROPE_FREQS)
        return GgufFacts(
            architecture=str(metadata["general.architecture"]),
            metadata=metadata,
            num_elements={name: math.prod(int(size) for size in tensor.shape) for name, tensor in tensors.items()},
            types=frozenset(tensor.tensor_type.name for tensor in tensors.values()),
            rope_freqs=None if freqs is None else tuple(float(value) for value in freqs.data),
        )
    except Exception as error:  # a file can be wrong in any way
        raise InvalidRequestError(
            f"{file.name} is no GGUF file that can be read: {error}", code="model_unsupported"
        ) from error
