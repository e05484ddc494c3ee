# Made from _async/__init__.py by make_sync.py: change that file.
"""The client for asyncio."""
