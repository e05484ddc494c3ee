"""Tests of what runs a server: signals, containers, manifests."""
