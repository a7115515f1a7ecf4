"""Step-level batching: many requests share each call of a bundle's step stage. No web framework is in here."""

from dit_runtime.serve.batcher import Batcher
from dit_runtime.serve.ticket import Busy, Closed, Late, Stats, Ticket

__all__ = ["Batcher", "Busy", "Closed", "Late", "Stats", "Ticket"]
