"""Fixtures of the chaos tests: those of the integration tests."""

from tests.integration.conftest import demo, ranks

__all__ = ["demo", "ranks"]
