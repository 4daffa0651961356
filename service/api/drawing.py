"""Images with their detections drawn in, as PNG or JPEG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from PIL import Image

from ghm_triton.drawing import draw_detections
from service.http.bodies import parse_weights

PNG, JPEG = "image/png", "image/jpeg"


def draw(image: Image.Image, detections: Iterable[dict[str, Any]], kind: str) -> bytes:
    """Draw detections into a copy of an image.

    Args:
        image: RGB.
        detections: As in an answer.
        kind: `PNG` or `JPEG`, the media types.

    Returns:
        The file.
    """
    labelled = [
        (one["box"], f"{one['class']} {one['score']:.2f}", one["label"]) for one in detections
    ]
    options = {"quality": 90} if kind == JPEG else {"compress_level": 1}
    buffer = io.BytesIO()
    draw_detections(image, labelled).save(buffer, kind.removeprefix("image/"), **options)
    return buffer.getvalue()


def preferred_type(accept: str) -> str:
    """Return `JPEG` if an `Accept` header prefers it to PNG, else `PNG`, which is lossless."""
    weights = parse_weights(accept)
    fallback = weights.get("image/*", weights.get("*/*", 0.0))
    return JPEG if weights.get(JPEG, fallback) > weights.get(PNG, fallback) else PNG
