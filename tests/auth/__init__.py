"""Tests of keys, tenants, limits and the audit log."""
