"""Tests: real mounts, real SQLite, real images; doubles only where a fault is injected."""
