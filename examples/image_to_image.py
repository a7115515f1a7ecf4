"""Change a picture towards a class at three strengths, side by side in one PNG. The bundle is built with `--encoder`.

python examples/image_to_image.py BUNDLE LABEL PICTURE OUTPUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dit_runtime import Pipeline
from dit_runtime.images import write_png
from dit_runtime.picture_files import read_picture

STRENGTHS = (0.3, 0.6, 0.9)  # the share of the steps that change the picture


def main(bundle: Path, label: int, source: Path, output: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        picture = read_picture(source, *pipe.manifest.picture_size)
        changed = [pipe.sample(labels=[label], image=picture, strength=share, seed=7)[0] for share in STRENGTHS]
    write_png(output, np.concatenate([picture, *changed], axis=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
