"""Text lines and pages drawn with known content: words of CPython's manual in the fonts at hand, a seed each.

Fonts are Debian's DejaVu, Liberation, FreeFont and Carlito where installed, else the one Pillow bundles.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FONT_FOLDERS = ("dejavu", "liberation", "freefont", "crosextra")
UNFIT = ("Math", "ExtraLight", "Symbol", "Dingbats")  # faces without ordinary Latin letters, or too thin to read

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Image = Any  # PIL.Image.Image; PIL is imported only where it is used


@cache
def _words() -> tuple[str, ...]:
    """Words of the manual in order, without its mark-up."""
    from pydoc_data.topics import topics

    text = re.sub(r"[^\x21-\x7e]+|[*`_|~^\\<>{}=+#-]+", " ", " ".join(topics[key] for key in sorted(topics)))
    return tuple(word for word in text.split() if re.search("[A-Za-z0-9]", word))


@cache
def _fonts() -> tuple[Path, ...]:
    root = Path("/usr/share/fonts/truetype")
    files = (file for folder in FONT_FOLDERS for file in sorted((root / folder).glob("*.ttf")))
    return tuple(file for file in files if not any(word in file.name for word in UNFIT))


def _font(draw: random.Random, size: int) -> Any:
    from PIL import ImageFont

    fonts = _fonts()
    return ImageFont.truetype(draw.choice(fonts), size) if fonts else ImageFont.load_default(size)


def phrases(count: int, seed: int, shortest: int = 6, longest: int = 32) -> list[str]:
    """``count`` runs of words of ``shortest`` to ``longest`` characters."""
    words, draw, found = _words(), random.Random(seed), list[str]()
    while len(found) < count:
        at = draw.randrange(len(words) - longest)
        phrase = words[at]
        for word in words[at + 1 : at + longest]:
            if len(phrase) + 1 + len(word) > longest or (len(phrase) >= shortest and draw.random() < 0.2):
                break
            phrase += " " + word
        if shortest <= len(phrase) <= longest:
            found.append(phrase)
    return found


def line(text: str, seed: int) -> Image:
    """One line as a photo would show it: random font, size and contrast; sometimes inverse, turned, blurred; noise."""
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFilter

    draw = random.Random(seed)
    font = _font(draw, draw.randint(18, 40))
    left, top, right, bottom = font.getbbox(text)
    pad, paper, ink = draw.randint(3, 8), draw.randint(170, 255), draw.randint(0, 70)
    if draw.random() < 0.25:
        paper, ink = ink, paper
    size = (round(right - left) + 2 * pad, round(bottom - top) + 2 * pad)
    image = Images.new("RGB", size, (paper,) * 3)
    ImageDraw.Draw(image).text((pad - left, pad - top), text, font=font, fill=(ink,) * 3)
    if draw.random() < 0.5:
        turn = draw.uniform(-1.5, 1.5)
        image = image.rotate(turn, resample=Images.Resampling.BILINEAR, expand=True, fillcolor=(paper,) * 3)
    if draw.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.4, 1.3)))
    return _noisy(image, draw.uniform(0, 14), seed)


def page(seed: int, width: int = 640, height: int = 640, phrase_count: int = 12) -> tuple[Image, list[Box]]:
    """A page of scattered phrases that don't touch, and each phrase's box."""
    from PIL import Image as Images
    from PIL import ImageDraw

    draw = random.Random(seed)
    image = Images.new("RGB", (width, height), (draw.randint(200, 255),) * 3)
    boxes: list[Box] = []
    for phrase in phrases(phrase_count, seed, 4, 26):
        for _attempt in range(30):
            font = _font(draw, draw.randint(14, 34))
            left, top, right, bottom = font.getbbox(phrase)
            if right - left > width - 20:
                continue
            x, y = draw.randint(8, int(width - right + left) - 8), draw.randint(8, int(height - bottom + top) - 8)
            box = (x, y, x + right - left, y + bottom - top)
            if all(_apart(box, other) for other in boxes):
                ink = tuple(draw.randint(0, 90) for _ in range(3))
                ImageDraw.Draw(image).text((x - left, y - top), phrase, font=font, fill=ink)
                boxes.append(box)
                break
    return _noisy(image, draw.uniform(0, 12), seed), boxes


def _apart(a: Box, b: Box, across: int = 14, down: int = 10) -> bool:
    """Whether two boxes leave ``across`` pixels sideways or ``down`` pixels upright between them."""
    return a[2] + across < b[0] or b[2] + across < a[0] or a[3] + down < b[1] or b[3] + down < a[1]


def _noisy(image: Image, deviation: float, seed: int) -> Image:
    from PIL import Image as Images

    pixels = np.asarray(image, np.float32)
    noise: NDArray[np.float64] = np.random.default_rng(seed).normal(0, deviation, pixels.shape)
    return Images.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
