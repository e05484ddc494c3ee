"""All routes, in the order in which the documentation lists them."""

from server.api import admin, chat, completions, draining, keys, system, tgi, tiers, tokens

__all__ = ["ROUTERS"]

ROUTERS = tuple(part.router for part in (tgi, completions, chat, tokens, system, draining, admin, tiers, keys))
