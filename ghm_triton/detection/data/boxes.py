"""Validation of boxes read from a file."""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]

_THINNEST = 0.01  # pixels; float32 separates corners this far apart up to 1e5
_ROUNDING = 1.0  # pixels; annotation tools round outwards, or count from 0 instead of 1


def clean_box(
    corners: Box, width: int, height: int, *, one_based: bool = False
) -> tuple[Box | None, str | None]:
    """Clip a box to the image, or reject it.

    An overhang of up to one pixel is rounding and is clipped without a report.

    Args:
        corners: `x1, y1, x2, y2` as written in the file.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        one_based: The corners are the first and last pixel of the box, counted from 1 (Pascal
            VOC), and become 0-based edges: `x1 - 1, y1 - 1, x2, y2`.

    Returns:
        The box, None if it is unusable; and the problem, None if there is none.
    """
    written = f"box ({', '.join(f'{value:g}' for value in corners)})"
    if not all(map(math.isfinite, corners)):
        return None, f"{written} is not finite; box dropped"
    x1, y1, x2, y2 = corners
    if _has_no_area(corners):
        return None, f"{written} has no area; box dropped"
    if one_based:
        x1, y1 = x1 - 1, y1 - 1
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if _has_no_area(clipped):
        return None, f"{written} lies outside the {width}x{height} image; box dropped"
    overhang = max(-x1, -y1, x2 - width, y2 - height)
    if overhang > _ROUNDING:
        return clipped, f"{written} hangs over the {width}x{height} image; box clipped"
    return clipped, None


def _has_no_area(box: Box) -> bool:
    return box[2] - box[0] < _THINNEST or box[3] - box[1] < _THINNEST
