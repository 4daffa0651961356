"""Headers that Pillow reads within bounds by itself."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageFile, UnidentifiedImageError

from service.images.headers.base import ImageTooLargeError, damaged

# Pillow warns per broken entry of a file: a request could write a thousand lines into the log.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_lazily(content: bytes, kind: str) -> ImageFile.ImageFile:
    """Open an image file of a format without decoding it.

    Raises:
        DamagedImageError: The header is broken, or of a variant that Pillow does not read.
        ImageTooLargeError: The image exceeds Pillow's own limit of pixels.
    """
    try:
        return Image.open(io.BytesIO(content), formats=(kind.upper(),))
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"the {kind} image is too large: {error}") from error
    except UnidentifiedImageError as error:  # its own message shows the address of a buffer
        raise damaged(kind, "its header is broken, or of a variant that is not read") from error
    except Exception as error:  # decoders raise any exception on broken bytes
        raise damaged(kind, short_reason(error)) from error


def short_reason(error: Exception) -> str:
    """Return the first line of an error, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
