"""A process that changes adapters until it is killed, and says what it does: see test_crash.

It prints `begin <name> <contents>` before each change and `done <name> <contents>` after it returned; contents are the
number that the files of the name's current generation are made from, or `-` if it has none. Its argument is a seed for
random changes without end, or `tour` for a few that pass every failpoint of the store.
"""

import os
import random
import sys
from pathlib import Path

from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.failpoints import ENVIRONMENT_VARIABLE, arm

NAMES = ("red", "green", "blue")
Change = tuple[str, str, int]
TOUR: list[Change] = [
    ("publish", "red", 1),
    ("publish", "red", 2),
    ("rollback", "red", 0),
    ("publish", "green", 2),
    ("delete", "red", 0),
    ("publish", "red", 3),
    ("delete", "green", 0),
    ("delete", "red", 0),
    ("publish", "blue", 4),
]


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


def outcome(store: AdapterStore, change: Change) -> str | None:
    """What the name's current contents will be; None if the change is not possible."""
    kind, name, number = change
    history = store.peek(name)
    if kind == "publish":
        return str(number)
    if kind == "delete":
        return "-" if history.generations else None
    older = [record for record in history.generations if record.generation < history.current]
    return str(older[-1].details["number"]) if older else None


def apply(store: AdapterStore, change: Change) -> None:
    kind, name, number = change
    if kind == "publish":
        publish(store, name, number)
    elif kind == "delete":
        store.delete(name)
    else:
        store.rollback(name)


def random_change(rng: random.Random) -> Change:
    kind = rng.choices(("publish", "delete", "rollback"), (6, 2, 2))[0]
    return kind, rng.choice(NAMES), rng.randrange(20)


def _say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def _perform(store: AdapterStore, change: Change) -> None:
    contents = outcome(store, change)
    if contents is not None:
        _say("begin", change[1], contents)
        apply(store, change)
        _say("done", change[1], contents)


def main(root: Path, what: str) -> None:
    if failpoint := os.environ.get(ENVIRONMENT_VARIABLE):
        arm(failpoint)
    store = AdapterStore(root, max_generations=4)
    store.open()
    _say("open")
    if what == "tour":
        for change in TOUR:
            _perform(store, change)
        return
    rng = random.Random(int(what))
    while True:
        _perform(store, random_change(rng))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
