"""Runnable programs, one a system. What they share is in ``models`` and ``data``."""
