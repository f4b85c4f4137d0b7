"""Draw a folder of five classes of shapes, 224 pixels wide and high, 120 to 6 training images a class and 20
test images each:  python results/small/draw.py FOLDER"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = {"circle": 120, "square": 60, "triangle": 30, "cross": 15, "ring": 6}
generator = np.random.default_rng(0)


def draw(shape):
    """A shape of some place, size and light colour on a dark ground, with noise."""
    image = Image.new("RGB", (224, 224), tuple(int(value) for value in generator.integers(0, 90, 3)))
    pen = ImageDraw.Draw(image)
    x, y, r = generator.integers(70, 154), generator.integers(70, 154), generator.integers(30, 65)
    colour = tuple(int(value) for value in generator.integers(120, 256, 3))

    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    if shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=colour)
    if shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    if shape == "cross":
        pen.rectangle([x - r, y - r // 4, x + r, y + r // 4], fill=colour)
        pen.rectangle([x - r // 4, y - r, x + r // 4, y + r], fill=colour)
    if shape == "ring":
        pen.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=max(4, int(r) // 4))

    pixels = np.asarray(image).astype(int) + generator.integers(-12, 13, (224, 224, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


for shape, size in CLASSES.items():
    for part, number in (("train", size), ("test", 20)):
        folder = Path(sys.argv[1]) / part / shape
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            draw(shape).save(folder / f"{i:03d}.jpg", quality=90)
