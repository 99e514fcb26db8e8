"""Twelve seeded edits of a photograph, for tests and benchmarks of copy detection. Each comes out as a JPEG file."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

Picture = Image.Image


def jpeg(picture: Picture, quality: int = 88) -> bytes:
    """As a JPEG file."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def cropped(picture: Picture, side: float, draw: random.Random) -> Picture:
    """A window of ``side`` of both sides, at a random place."""
    width, height = picture.size
    w, h = round(width * side), round(height * side)
    x, y = draw.randint(0, width - w), draw.randint(0, height - h)
    return picture.crop((x, y, x + w, y + h))


def captioned(picture: Picture, draw: random.Random) -> Picture:
    """A bar of 18 % of the height with text, above or below; painted over the picture or joined to it."""
    width, height = picture.size
    bar = round(height * 0.18)
    above, over = draw.random() < 0.5, draw.random() < 0.5
    out = picture.copy() if over else Image.new("RGB", (width, height + bar), "white")
    if not over:
        out.paste(picture, (0, bar if above else 0))
    y = 0 if above else out.height - bar
    ground = draw.choice(["white", "black"])
    text = draw.choice(["when the code works at last", "ONE DOES NOT SIMPLY", "breaking news today"])
    pen = ImageDraw.Draw(out)
    pen.rectangle((0, y, width, y + bar), fill=ground)
    font = ImageFont.load_default(size=max(10, bar // 2))
    pen.text((8, y + bar * 0.2), text, fill="black" if ground == "white" else "white", font=font)
    return out


def pasted(picture: Picture, background: Picture, draw: random.Random) -> Picture:
    """At a random place of another photograph, as large as half of its sides allow."""
    scale = min(0.5 * background.width / picture.width, 0.5 * background.height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    out = background.copy()
    place = draw.randint(0, background.width - size[0]), draw.randint(0, background.height - size[1])
    out.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return out


def disc(picture: Picture, draw: random.Random) -> Picture:
    """A disc with a face over 20 % of the area."""
    width, height = picture.size
    r = min(math.sqrt(0.2 * width * height / math.pi), width / 2, height / 2)
    x, y = draw.uniform(r, width - r), draw.uniform(r, height - r)
    out = picture.copy()
    pen = ImageDraw.Draw(out)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 205, 40))
    for side in (-1, 1):
        eye = x + side * r * 0.4
        pen.ellipse((eye - r * 0.12, y - r * 0.35, eye + r * 0.12, y - r * 0.05), fill=(60, 40, 10))
    mouth = (x - r * 0.6, y - r * 0.5, x + r * 0.6, y + r * 0.6)
    pen.arc(mouth, 20, 160, fill=(60, 40, 10), width=max(2, round(r * 0.08)))
    return out


def recoloured(picture: Picture, draw: random.Random) -> Picture:
    """Hue turned by 20 to 45 of 255, and each channel multiplied by .65 to 1.25."""
    turn = draw.choice([-1, 1]) * draw.randint(20, 45)
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    gains = [draw.uniform(0.65, 1.25) for _ in range(3)]
    channels = [
        channel.point([min(255, int(level * gain)) for level in range(256)])
        for channel, gain in zip(turned.split(), gains, strict=True)
    ]
    return Image.merge("RGB", channels)


def contrast_grey(picture: Picture) -> Picture:
    """Grey, with 1.6 times the contrast."""
    return ImageEnhance.Contrast(picture.convert("L").convert("RGB")).enhance(1.6)


def half(picture: Picture) -> Picture:
    """Both sides halved."""
    size = max(1, picture.width // 2), max(1, picture.height // 2)
    return picture.resize(size, Image.Resampling.LANCZOS)


# name -> edit(photograph, another photograph, draw)
EDITS: dict[str, Callable[[Picture, Picture, random.Random], bytes]] = {
    "jpeg q20": lambda picture, other, draw: jpeg(picture, 20),
    "half size": lambda picture, other, draw: jpeg(half(picture)),
    "grey": lambda picture, other, draw: jpeg(contrast_grey(picture)),
    "flip": lambda picture, other, draw: jpeg(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "blur": lambda picture, other, draw: jpeg(picture.filter(ImageFilter.GaussianBlur(3))),
    "caption": lambda picture, other, draw: jpeg(captioned(picture, draw)),
    "colour": lambda picture, other, draw: jpeg(recoloured(picture, draw)),
    "disc": lambda picture, other, draw: jpeg(disc(picture, draw)),
    "rotate 12": lambda picture, other, draw: jpeg(picture.rotate(12 * draw.choice([-1, 1]), Image.Resampling.BICUBIC)),
    "crop .84": lambda picture, other, draw: jpeg(cropped(picture, 0.84, draw)),
    "crop .67": lambda picture, other, draw: jpeg(cropped(picture, 0.67, draw)),
    "pasted": lambda picture, other, draw: jpeg(pasted(picture, other, draw)),
}
