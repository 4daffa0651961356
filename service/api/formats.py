"""Answers as something else than our JSON: a drawn image, and COCO's results."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ghm_triton.drawing import draw_detections

PNG, JPEG = "image/png", "image/jpeg"


def coco_results(
    answers: Iterable[dict[str, Any]], image_ids: Sequence[int | str]
) -> list[dict[str, Any]]:
    """Detections as COCO's tools read results.

    Args:
        answers: One an image, as `service.api.responses.image_answer` makes them.
        image_ids: One an image.

    Returns:
        One object a detection: `image_id`, `category_id`, which is the label + 1 as COCO counts
        from 1, `bbox` as x, y, width and height in pixels, and `score`.
    """
    return [
        {
            "image_id": image_id,
            "category_id": found["label"] + 1,
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
            "score": found["score"],
        }
        for image_id, answer in zip(image_ids, answers, strict=True)
        for found in answer["detections"]
        for x1, y1, x2, y2 in [found["box"]]
    ]


def drawn(image: Image.Image, detections: Iterable[dict[str, Any]], kind: str) -> bytes:
    """An image with its detections drawn in.

    Args:
        image: RGB.
        detections: As in an answer.
        kind: `PNG` or `JPEG`, the media types.

    Returns:
        The file.
    """
    shown = [(f["box"], f"{f['class']} {f['score']:.2f}", f["label"]) for f in detections]
    buffer = io.BytesIO()
    if kind == JPEG:
        draw_detections(image, shown).save(buffer, "JPEG", quality=90)
    else:
        draw_detections(image, shown).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def preferred_kind(accept: str) -> str:
    """`JPEG` where a client's `Accept` prefers it to PNG, else `PNG`, which loses nothing."""
    return JPEG if _weight(accept, JPEG) > _weight(accept, PNG) else PNG


def _weight(accept: str, kind: str) -> float:
    """How much a media type is wanted, from 0 to 1; the most specific range says it."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights[name] = next((_number(one[2:]) for one in parameters if one.startswith("q=")), 1.0)
    for name in (kind, "image/*", "*/*"):
        if name in weights:
            return weights[name]
    return 0.0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
