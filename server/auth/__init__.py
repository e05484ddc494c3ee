"""Keys and tenants: who calls, what a key may reach, how much of it, and a log of what was changed.

Nothing here knows HTTP; `server.api.authentication` is the way in.
"""
