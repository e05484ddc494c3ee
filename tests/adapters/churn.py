"""A process that publishes and deletes adapters until it is killed, and says what it does: see test_crash.

It prints `begin <name> <contents>` before each change and `done <name> <contents>` after it returned; contents are the
number that the files are made from, or `-` for a delete.
"""

import os
import random
import sys
from contextlib import suppress
from pathlib import Path

from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.errors import NotFoundError

NAMES = ("red", "green", "blue")


def contents_of(number: int) -> tuple[bytes, bytes]:
    """The two files of a number; up to 200 kB."""
    rng = random.Random(number)
    return b'{"r": %d}' % number, rng.randbytes(rng.randrange(1, 200_000))


def publish(store: AdapterStore, name: str, number: int) -> None:
    config, weights = contents_of(number)
    with store.staging_folder() as folder:
        (folder / CONFIG_NAME).write_bytes(config)
        (folder / WEIGHTS_NAME).write_bytes(weights)
        store.publish(name, folder, {"number": number})


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main(root: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = AdapterStore(root)
    store.open()
    say("open")
    while True:
        name = rng.choice(NAMES)
        if rng.random() < 0.3:
            say("begin", name, "-")
            with suppress(NotFoundError):
                store.delete(name)
            say("done", name, "-")
        else:
            number = rng.randrange(20)
            say("begin", name, number)
            publish(store, name, number)
            say("done", name, number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
