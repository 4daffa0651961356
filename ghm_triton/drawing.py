"""Drawing of detections into their image, with Pillow alone."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from ghm_triton.tables import printable

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


def draw_detections(
    image: Image.Image, detections: Iterable[tuple[list[float], str, int]]
) -> Image.Image:
    """Draw boxes with captions; small images are enlarged so that captions fit.

    Args:
        image: An RGB image.
        detections: `(box, caption, label)`; boxes are `x1, y1, x2, y2` in pixels.

    Returns:
        A new RGB image.
    """
    zoom = max(1, round(512 / max(image.size)))
    canvas = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    for box, caption, label in detections:
        caption = printable(caption)  # a line feed has no place in a caption
        colour = PALETTE[label % len(PALETTE)]
        x1, y1, x2, y2 = (value * zoom for value in box)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        left, top, right, bottom = draw.textbbox((x1, y1), caption, font=font, anchor="lb")
        if top < 0:
            left, top, right, bottom = draw.textbbox((x1, y1), caption, font=font, anchor="lt")
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=colour)
        draw.text((left, top), caption, fill="white", font=font, anchor="lt")
    return canvas
