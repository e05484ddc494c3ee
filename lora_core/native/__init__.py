"""Products, adapters and attention in C, compiled for this processor when they are first wanted.

PyTorch's own operators are made for many rows, for processors with bfloat16 products, and for one thing at a time. A
server multiplies a few rows with many weights that it reads once, on whatever processor it is given. Wherever there is
no compiler, no library that was built before, or another system than Linux, PyTorch's operators serve: `library` is
None then.

    python -m lora_core.native FOLDER    builds for the common kinds of processors, for images without a compiler

The threads are those of PyTorch's OpenMP, which is loaded already: a second runtime's threads would fight with them.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

__all__ = ["DTYPES", "build", "library", "processor"]

SOURCES = Path(__file__).parent
# Dtypes that there are libraries for, and what makes a source serve one.
DTYPES = {torch.bfloat16: "-DBFLOAT16", torch.float32: "-DFLOAT32"}
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared"]
# By what PyTorch says of the processor.
PROCESSORS = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
# Of the functions: p for an address, i for a number, f for a fraction; their result is not 0 if memory was lacking.
SIGNATURES = {"panel_width": "", "linear": "pipppiii", "lora": "pipiippip", "attend": "p", "rms_norm": "pppiif", "silu_gate": "ppii"}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
# Set to a folder with libraries that were built before; or to "off".
VARIABLE = "LORAMUX_NATIVE"


def processor() -> str | None:
    """The kind of processor to compile for, as gcc names it; None for one that is not known to profit."""
    if platform.machine() != "x86_64":
        return None
    return PROCESSORS.get(torch.backends.cpu.get_cpu_capability())


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions for arrays of `dtype`; None where they cannot be had, which is logged once."""
    kind = processor()
    folder = os.environ.get(VARIABLE)
    if folder == "off" or kind is None or dtype not in DTYPES or not sys.platform.startswith("linux"):
        return None
    if "libgomp" not in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"):
        logger.info("PyTorch's own operators serve: this build of it does not use GNU OpenMP")
        return None
    name = _name(dtype, kind)
    built = None if folder is None else Path(folder) / name
    try:
        if built is None or not built.is_file():
            built = _cache_folder() / name
            if not built.is_file():
                build(dtype, kind, built)
        loaded = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("PyTorch's own operators serve, which are slower: no C library (%s)", error)
        return None
    for function, arguments in SIGNATURES.items():
        getattr(loaded, function).argtypes = [TYPES[argument] for argument in arguments]
    return loaded


def build(dtype: torch.dtype, kind: str, path: Path) -> None:
    """Compile the library for a kind of processor.

    Raises:
        FileNotFoundError: there is no gcc.
        subprocess.CalledProcessError: it fails.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("gcc is not installed")
    sources = [str(source) for source in _sources() if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, DTYPES[dtype], f"-march={kind}", "-o", str(made), *sources, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(path)


def _sources() -> Sequence[Path]:
    return sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.c")])


def _name(dtype: torch.dtype, kind: str) -> str:
    """Of a library's file: other sources or flags make another one."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in _sources():
        digest.update(source.read_bytes())
    return f"{str(dtype).removeprefix('torch.')}-{kind}-{digest.hexdigest()[:16]}.so"


def _cache_folder() -> Path:
    """Where compiled libraries are kept: the user's own, as what lies there is run."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "loramux" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="loramux-native-"))
