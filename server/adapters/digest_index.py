"""DigestIndex: which contents some generation has, without walking through all names."""

from collections import Counter
from collections.abc import Iterator

from server.adapters.record import AdapterRecord, History

__all__ = ["DigestIndex"]


class DigestIndex:
    """Counts the names that have an object in their histories. Not thread-safe: the store's lock is around it."""

    def __init__(self) -> None:
        self._num_names: Counter[str] = Counter()
        self._folded_bytes: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._num_names

    def add(self, history: History) -> None:
        self._num_names.update(history.digests)
        self._folded_bytes |= {record.digest: _folded_bytes(record) for record in history.generations}

    def remove(self, history: History) -> None:
        self._num_names -= Counter(history.digests)
        for digest in history.digests - self._num_names.keys():
            del self._folded_bytes[digest]

    def elements(self) -> Iterator[str]:
        """Each digest once for each name that has it."""
        return self._num_names.elements()

    def folded_bytes(self, digest: str) -> int:
        """Size of an adapter's arrays in memory, as far as its check at upload tells; 0 if it is gone."""
        return self._folded_bytes.get(digest, 0)


def _folded_bytes(record: AdapterRecord) -> int:
    num_bytes = record.details.get("folded_bytes")
    return num_bytes if isinstance(num_bytes, int) else record.num_bytes
