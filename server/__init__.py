"""The loramux server."""
