"""Draw a PNG a label from a bundle of classes, with dit-runtime alone.

python examples/sample.py BUNDLE FOLDER LABEL …
"""

from __future__ import annotations

import sys
from pathlib import Path

from dit_runtime import Pipeline
from dit_runtime.images import write_png


def main(bundle: Path, folder: Path, labels: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with Pipeline.load(bundle) as pipe:
        pictures = pipe.sample(labels=labels, seed=list(range(len(labels))))  # uint8 [N, H, W, 3]
    for label, picture in zip(labels, pictures, strict=True):
        write_png(folder / f"{label}.png", picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
