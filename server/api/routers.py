"""All routes, in the order in which the documentation lists them."""

from server.api import admin, chat, completions, draining, jobs, keys, lifecycle, messages, system, tgi, tiers, tokens

__all__ = ["ROUTERS"]

GENERATING = (tgi, completions, chat, messages, tokens)
ROUTERS = tuple(part.router for part in (*GENERATING, system, draining, admin, tiers, jobs, lifecycle, keys))
