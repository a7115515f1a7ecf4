"""The C++ library, for the tests of each family."""

from __future__ import annotations

from tests.cpp.conftest import build, dit_generate

__all__ = ["build", "dit_generate"]
