"""Adapters on disk, in host memory and in slots."""
