"""Guidance: which predictions a step takes of the network, and how they become one."""

from __future__ import annotations

from enum import Enum


class Groups(Enum):
    """The rows of the network that a step evaluates for each sample."""

    OWN = "own"  # its condition alone
    BOTH = "both"  # its condition and its negative, which the network mixes
    APART = "apart"  # both, as two unguided samples that a policy mixes

    @property
    def rows(self) -> int:
        """Return the rows for each sample."""
        return 1 if self is Groups.OWN else 2
