"""Build the libraries for all kinds of processors; with LORAMUX_NATIVE=FOLDER they are used."""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_core.native import DTYPES, PROCESSORS, build, library_name

__all__ = ["main"]


def main() -> None:
    """The command: one file for each kind of processor and dtype."""
    parser = argparse.ArgumentParser(prog="lora_core.native", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the libraries go")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(dtype, kind, folder / library_name(dtype, kind)) for kind in PROCESSORS.values() for dtype in DTYPES]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(lambda each: build(*each), wanted):
            pass


if __name__ == "__main__":
    main()
