"""`dit-export bench`: a step and a picture side by side."""

from __future__ import annotations

from dit_export.bench import command
from dit_runtime.options import Command

COMMAND = Command(
    "bench",
    "time a step and a picture next to PyTorch and plain exports",
    command.add_options,
    command.run,
    (
        "bench S/2 --rounds 11",
        "bench XL/2 --only eager-fp32 'ours-*' --results bench.json --svg bench.svg",
    ),
)
