"""Makes a plot small enough for a repository: python tests/bench/shrink_plot.py SCALE COLOURS PNG..., in place.

python tests/bench/shrink_plot.py 0.625 128 fig3-small.png
"""

import sys

from PIL import Image


def shrink(path: str, scale: float, colours: int) -> None:
    image = Image.open(path).convert("RGB")
    smaller = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    smaller.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    for name in sys.argv[3:]:
        shrink(name, float(sys.argv[1]), int(sys.argv[2]))
