"""Which scope a route needs. What is not in the table is reached with the scope `admin` only: deny by default."""

import re
from dataclasses import dataclass

from server.auth.keys import Scope

__all__ = ["OPEN", "AccessRule", "find_rule"]

READ = frozenset({"GET", "HEAD"})
WRITE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
OPEN: frozenset[Scope] = frozenset()
"""Of a rule: no key is needed."""

GENERATE = frozenset({Scope.GENERATE})
LOOK = frozenset({Scope.GENERATE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE})
ADMIN = frozenset({Scope.ADMIN})


@dataclass(frozen=True, slots=True)
class AccessRule:
    """For these methods on these paths one of these scopes is needed.

    Attributes:
        is_work: asks the model for something: counts against the key's limits.
        is_audited: changes something that others see.
    """

    methods: frozenset[str]
    path: re.Pattern[str]
    scopes: frozenset[Scope]
    is_work: bool = False
    is_audited: bool = False


def _rule(
    methods: frozenset[str], path: str, scopes: frozenset[Scope], *, is_work: bool = False, is_audited: bool = False
) -> AccessRule:
    return AccessRule(methods, re.compile(path), scopes, is_work, is_audited)


# The first that fits counts.
RULES = (
    _rule(READ, r"/(health|ready|ping)?", OPEN),
    _rule(WRITE, r"/(generate|generate_stream|invocations)?", GENERATE, is_work=True),
    _rule(WRITE, r"/v1/(completions|chat/completions|messages)", GENERATE, is_work=True),
    _rule(WRITE, r"/(tokenize|detokenize|chat_tokenize)", GENERATE),
    _rule(READ, r"/info|/version|/v1/models(/.+)?", LOOK),
    _rule(READ, r"/docs(/.*)?|/redoc|/openapi\.json", LOOK),
    _rule(READ, r"/metrics", ADMIN),
    _rule(WRITE, r"/admin/adapters/[^/]+/(pin|unpin|evict)", ADMIN, is_audited=True),
    _rule(READ, r"/admin/adapters(/.+)?", frozenset({Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE})),
    _rule(WRITE, r"/admin/adapters(/.+)?", frozenset({Scope.ADAPTERS_WRITE}), is_audited=True),
    # Which kinds a tenant may begin, `server.tenant_jobs` knows.
    _rule(READ, r"/admin/jobs(/.+)?", frozenset({Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE})),
    _rule(WRITE, r"/admin/jobs(/.+)?", frozenset({Scope.ADAPTERS_WRITE}), is_audited=True),
    _rule(READ, r"/admin/.+", ADMIN),
    _rule(WRITE, r"/admin/.+", ADMIN, is_audited=True),
    # They name folders of the server's disk.
    _rule(READ, r"/v1/lora_adapters(/.+)?", ADMIN),
    _rule(WRITE, r"/v1/((un)?load_lora_adapter|lora_adapters(/.+)?)", ADMIN, is_audited=True),
)


def find_rule(method: str, path: str) -> AccessRule | None:
    """The rule of a request; None if the table does not know its route."""
    for rule in RULES:
        if method in rule.methods and rule.path.fullmatch(path):
            return rule
    return None
