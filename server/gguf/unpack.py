"""A GGUF file unpacked into a Hugging Face folder, weights in floating point, tokenizer and chat template with them."""

import errno
import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from server.cache import default_cache_dir, made_once
from server.errors import InvalidRequestError, ServerError, StorageFullError, UnavailableError
from server.gguf.settle import check_complete, end_tokens, settle_config
from server.gguf.source import MARK, GgufFacts, check_packages, read_facts
from server.gguf.tokenizer import check_saved, load_tokenizer

__all__ = ["ensure_unpacked", "unpack"]

# Goes up when `unpack` writes something else, so that old folders are not used any more.
FORMAT = 1
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
SPARE_BYTES = 64 << 20  # tokenizer and what a file system needs


def ensure_unpacked(file: Path, dtype: str, *, report: Callable[[str], None], cache_dir: Path | None = None) -> Path:
    """The folder of a file's model; made by the first call, and again when the file, or a tokenizer beside it, changes.

    It may be deleted whenever nobody uses it.

    Args:
        dtype: "bfloat16", "float16" or "float32", of the weights.
        report: is told what is being done, a line at a time.
        cache_dir: as for `server.cache.default_cache_dir`, which is the default.

    Raises:
        InvalidRequestError: `quantization_missing`, or `model_unsupported`, which says what of it is not served.
        StorageFullError: the disk has no room for the weights.
        UnavailableError: code `storage_unavailable`, the cache folder cannot be written.
    """
    folder = (cache_dir or default_cache_dir()) / "gguf" / f"{file.stem}-{_key(file, dtype)}"
    if folder.is_dir():
        return folder
    facts = read_facts(file)
    num_bytes = facts.num_parameters * BYTES[dtype]

    def make(partial: Path) -> None:
        start = time.monotonic()
        report(f"unpacking {file.name} to {folder}: once, {num_bytes / 1e6:.0f} MB of {dtype} ...")
        if shutil.disk_usage(partial).free < num_bytes + SPARE_BYTES:
            raise StorageFullError(
                f"unpacking {file.name} takes {num_bytes / 1e9:.1f} GB in the cache folder, which has less: "
                "LORAMUX_CACHE names another one"
            )
        unpack(file, partial, dtype, facts=facts)
        if facts.rounded:
            mark = {"file": file.name, "types": facts.rounded}
            (partial / MARK).write_text(json.dumps(mark), encoding="utf-8")
        report(f"{file.name} was unpacked in {time.monotonic() - start:.0f} s")

    try:
        return made_once(folder, make)
    except OSError as error:
        advice = "LORAMUX_CACHE names another one"
        if error.errno in FULL:
            raise StorageFullError(f"the cache folder has no space left: {advice}") from error
        reason = f"the cache folder cannot be written: {error.strerror}"
        raise UnavailableError(f"{reason}; {advice}", code="storage_unavailable") from error


def unpack(file: Path, folder: Path, dtype: str, *, facts: GgufFacts | None = None) -> None:
    """Write a file's model, tokenizer and chat template into the empty `folder`.

    Raises:
        InvalidRequestError: as `ensure_unpacked`.
    """
    check_packages()
    facts = facts or read_facts(file)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            _write(file, folder, dtype, facts)
    except ServerError:
        raise
    except ImportError as error:
        raise InvalidRequestError(f"GGUF files need a package: {error}", code="quantization_missing") from error
    except OSError as error:
        if error.errno is not None:  # of the disk; transformers' own have none
            raise
        raise _unreadable(file, error) from error
    except Exception as error:  # a file can be wrong in any way
        raise _unreadable(file, error) from error


def _write(file: Path, folder: Path, dtype: str, facts: GgufFacts) -> None:
    import torch  # noqa: PLC0415 - seconds to import, and needed once only
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig  # noqa: PLC0415

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config: Any = AutoConfig.from_pretrained(**source)
    settle_config(config, facts)
    tokenizer = load_tokenizer(file, facts.metadata, config.max_position_embeddings)
    model, found = AutoModelForCausalLM.from_pretrained(
        **source,
        config=config,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if found["missing_keys"] or found["mismatched_keys"]:
        key = min(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
        raise InvalidRequestError(f"{file.name} lacks {key}, or has it in another shape", code="model_unsupported")
    check_complete(facts, model)
    model.config.architectures = [type(model).__name__]
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF file's own title
    ends = end_tokens(facts)
    if len(ends) > 1:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_saved(tokenizer, folder)


def _key(file: Path, dtype: str) -> str:
    """Changes with all that `unpack` reads; not the contents, which would take long to read."""
    told: list[Any] = [FORMAT, dtype, str(file.resolve())]
    for path in (file, *(file.with_name(name) for name in BESIDE)):
        if path.is_file():
            stat = path.stat()
            told.append([path.name, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _unreadable(file: Path, error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"{file.name} cannot be loaded: {error}", code="model_unsupported")
