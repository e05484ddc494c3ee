"""Tests of the `loramux` command."""
