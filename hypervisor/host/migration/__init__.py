"""Domains on their way from this host, and to it (docs/migration.md)."""
