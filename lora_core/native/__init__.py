"""Products, adapters and attention in C, compiled for this processor when they are first wanted.

PyTorch's own operators are made for many rows, for processors with bfloat16 products, and for one thing at a time. A
server multiplies a few rows with many weights that it reads once, on whatever processor it is given. Wherever there is
no compiler, no library that was built before, or another system than Linux, PyTorch's operators serve: `library` is
None then.

    python -m lora_core.native FOLDER    builds for all kinds of processors, for images without a compiler

The threads are those of PyTorch's OpenMP, which is loaded already: a second runtime's threads would fight with them.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

__all__ = ["DTYPES", "PROCESSORS", "build", "library", "library_name", "processor"]

SOURCES = Path(__file__).parent
# Dtypes that there are libraries for, and what makes a source serve one.
DTYPES = {torch.bfloat16: "-DBFLOAT16", torch.float32: "-DFLOAT32"}
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC"]
# By what PyTorch says of the processor.
PROCESSORS = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
# Of the functions: p for an address, i for a number, f for a fraction; their result is not 0 if memory was lacking.
SIGNATURES = {
    "panel_width": "",
    "group_size": "",
    "pack": "ppppii",
    "unpack": "pppiii",
    "linear": "pippppiiip",
    "linear_int4": "pippppiiip",
    "lora": "pipiippip",
    "attend": "pp",
    "rms_norm": "pppiif",
    "silu_gate": "ppii",
    "row_maxima": "pppii",
    "decoder_layers": "pipii",
}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
# A folder with libraries that were built before (`python -m lora_core.native`), or "off".
VARIABLE = "LORAMUX_NATIVE"


def processor() -> str | None:
    """The kind of processor to compile for, as gcc names it; None for one that is not known to profit."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return None
    return PROCESSORS.get(torch.backends.cpu.get_cpu_capability())


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions for arrays of `dtype`; None where they cannot be had, which is logged once."""
    kind = processor()
    if os.environ.get(VARIABLE) == "off" or kind is None or dtype not in DTYPES:
        return None
    if "libgomp" not in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"):
        logger.info("PyTorch's own operators serve: this build of it does not use GNU OpenMP")
        return None
    try:
        loaded = _load(library_name(dtype, kind), lambda path: build(dtype, kind, path))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("PyTorch's own operators serve, which are slower: there is no C library (%s)", error)
        return None
    for function, arguments in SIGNATURES.items():
        getattr(loaded, function).argtypes = [TYPES[argument] for argument in arguments]
    return loaded


def library_name(dtype: torch.dtype, kind: str) -> str:
    """Of the file; other sources or flags make another one."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.c")]):
        digest.update(source.read_bytes())
    return f"{str(dtype).removeprefix('torch.')}-{kind}-{digest.hexdigest()[:16]}.so"


def build(dtype: torch.dtype, kind: str, path: Path, *flags: str) -> None:
    """Compile the library for a kind of processor.

    Raises:
        FileNotFoundError: there is no gcc.
        subprocess.CalledProcessError: it fails.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("gcc is not installed")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = {source: Path(folder) / f"{source.stem}.o" for source in SOURCES.glob("*.c")}
        command = [compiler, *FLAGS, *flags, DTYPES[dtype], f"-march={kind}", "-o"]

        def run(output: Path, *arguments: object) -> None:
            whole = [*command, str(output), *map(str, arguments)]
            subprocess.run(whole, check=True, capture_output=True, text=True)  # noqa: S603 - only paths of this package

        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda source: run(made[source], "-c", source), made))
        library_ = Path(folder) / path.name
        run(library_, "-shared", *made.values(), "-lm")
        library_.replace(path)


def _load(name: str, make: Callable[[Path], None]) -> ctypes.CDLL:
    """A library that was built before, or one that is built now and kept."""
    given = os.environ.get(VARIABLE)
    if given and (Path(given) / name).is_file():
        return ctypes.CDLL(str(Path(given) / name))
    kept = _cache_folder()
    if kept is not None:
        if not (kept / name).is_file():
            make(kept / name)
        return ctypes.CDLL(str(kept / name))
    with tempfile.TemporaryDirectory() as folder:  # it stays mapped
        make(Path(folder) / name)
        return ctypes.CDLL(str(Path(folder) / name))


def _cache_folder() -> Path | None:
    """Where libraries are kept; None if it is not this user's alone to write to, for what lies there is run."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("LORAMUX_CACHE") or Path(shared).expanduser() / "loramux") / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return None
    is_own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_own and os.access(folder, os.W_OK) else None
