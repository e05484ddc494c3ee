"""Make the synchronous client from the asynchronous one: `python clients/python/make_sync.py`.

Both are one text, so their surfaces cannot drift apart; a test fails while the copy is out of date.
"""

import re
from pathlib import Path

__all__ = ["made", "sync_text"]

PACKAGE = Path(__file__).parent / "loramux_client"
NOTE = "# Made from {name} by make_sync.py: change that file.\n"
WORDS = {
    "AsyncBaseTransport": "BaseTransport",
    "Awaitable[None]": "None",
    "StopAsyncIteration": "StopIteration",
    "_async": "_sync",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "aclose": "close",
    "aiter_bytes": "iter_bytes",
    "anext": "next",
    "aread": "read",
    "asyncio.sleep": "time.sleep",
    "import asyncio": "import time",
}
PATTERNS = [
    (r"import AsyncIterator, Awaitable, Callable", "import Callable, Iterator"),
    *((rf"(?<!\w){re.escape(word)}(?!\w)", other) for word, other in WORDS.items()),
    (r"\(await (.+?)\)\.", r"\1."),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\basync ", ""),
    (r"\bawait ", ""),
]


def sync_text(text: str, name: str) -> str:
    """The synchronous form of a module."""
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return NOTE.format(name=name) + text


def made() -> dict[Path, str]:
    """What each synchronous module should hold."""
    sources = sorted((PACKAGE / "_async").glob("*.py"))
    return {PACKAGE / "_sync" / path.name: sync_text(path.read_text(), f"_async/{path.name}") for path in sources}


if __name__ == "__main__":
    for target, text in made().items():
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
