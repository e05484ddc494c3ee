"""What a full cache block holds, as a key: the tokens in it and before it, who computed them, and for whom.

Keys and values depend on the adapters: two requests share a block only if their leases' keys, which are made of
content digests and weights and not of names, are equal. A salt keeps those apart who must not learn from the time
an answer takes what others have asked (one per tenant).

    root(lease key, salt) --sha256--> block 0's tokens --sha256--> block 1's tokens ...
"""

import hashlib
from array import array
from collections.abc import Hashable

from server.engine.request import GenerationRequest

__all__ = ["PrefixKeys"]

# Distinct (lease key, salt) pairs that are remembered; beyond, all begin anew.
MAX_ROOTS = 100_000


class PrefixKeys:
    """Makes the keys of requests' blocks, each block's once."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._roots: dict[Hashable, bytes] = {}
        self._num_roots = 0

    def extend(self, request: GenerationRequest, num_blocks: int) -> list[bytes]:
        """The keys of a request's first `num_blocks` blocks, all of them full of tokens that it has."""
        keys = request.block_keys
        size = self._block_size
        for i in range(len(keys), num_blocks):
            parent = keys[-1] if keys else self._root(request)
            tokens = array("q", request.token_ids(i * size, (i + 1) * size))
            keys.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return keys[:num_blocks]

    def _root(self, request: GenerationRequest) -> bytes:
        """A number of its own for everybody whose keys and values are the same, never used again."""
        owner = (request.route_key, request.cache_salt)
        if owner not in self._roots:
            if len(self._roots) >= MAX_ROOTS:
                self._roots.clear()
            self._num_roots += 1
            self._roots[owner] = self._num_roots.to_bytes(8, "little")
        return self._roots[owner]
