"""Reading a request's body: one image, a form, or JSON; and no more of it than allowed."""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request

from service.core.errors import ProblemError, short
from service.http.bodies import OffLoop, read_body
from service.http.forms import parse_form

_JSON = "application/json"
_FORM = "multipart/form-data"
_MOST_VALUES = 20_000


@dataclass(frozen=True)
class Upload:
    """What a request brought.

    Attributes:
        images: A name for use in errors, and the bytes, of each image.
        fields: The other fields, in order: text from a form, any JSON value from JSON.
        many: Whether the client asked for a list, with `files` or `images`.
    """

    images: list[tuple[str, bytes]]
    fields: list[tuple[str, Any]]
    many: bool = False


async def read_upload(
    request: Request, max_bytes: int, max_images: int, off_loop: OffLoop
) -> Upload:
    """Read the images and fields of a request.

    Args:
        request: With a body that is one image; or `multipart/form-data` with one `file` or any
            number of `files`; or JSON with base64 in `image` or a list of it in `images`.
        max_bytes: The most bytes to read, whatever `Content-Length` says, as sent and inflated.
        max_images: The most images.
        off_loop: Runs a blocking function elsewhere and awaits it.

    Returns:
        The images and the fields.

    Raises:
        ProblemError: 400 for a body that is malformed or has no image, 413 for one that is too
            large, 415 for a `Content-Type` or `Content-Encoding` that is not read here.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    is_image = kind in ("", "application/octet-stream") or kind.startswith("image/")
    if not is_image and kind not in (_FORM, _JSON):
        raise ProblemError(
            415,
            f"Content-Type is {short(kind)}; send one image as image/* or"
            f" application/octet-stream, files as {_FORM}, or base64 as {_JSON}",
        )
    body = await read_body(request, max_bytes, off_loop)
    if is_image:
        return Upload([("the body", body)], [])
    if kind == _FORM:
        return _read_form(content_type, body, max_images)
    return _read_json(body, max_images)


def _read_form(content_type: str, body: bytes, max_images: int) -> Upload:
    parts = parse_form(content_type, body, max_images)
    files = [part for part in parts if part.filename is not None]
    fields = [
        (part.name, part.content.decode("utf-8", errors="replace"))
        for part in parts
        if part.filename is None
    ]
    many = _is_many([part.name for part in files], [name for name, _ in fields])
    images = [
        (
            f"files[{place}] {short(part.filename)}" if many else f"file {short(part.filename)}",
            part.content,
        )
        for place, part in enumerate(files)
    ]
    return Upload(images, fields, many)


def _is_many(files: list[str], fields: list[str]) -> bool:
    """Whether a form's files are `files` (any number) and not one `file`."""
    if files and all(name == "files" for name in files):
        return True
    if files == ["file"]:
        return False
    if not files:
        hint = ""
        if {"file", "files"} & set(fields):
            hint = "; a part without a filename is text, not a file"
        raise ProblemError(
            400, f"the form holds no file{hint}: send one `file`, or several `files`"
        )
    raise ProblemError(
        400, f"the form's files are named {short(files)}: send one `file`, or only `files`"
    )


def _read_json(body: bytes, max_images: int) -> Upload:
    # Base64 has none of these signs. A megabyte of nothing but them would become fifty in memory.
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MOST_VALUES:
        raise ProblemError(400, f"the body is JSON of more than {_MOST_VALUES} values")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProblemError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ProblemError(400, "the body must be a JSON object with `image` or `images`")
    image, images = content.pop("image", None), content.pop("images", None)
    fields = [(name, value) for name, value in content.items() if value is not None]
    if (image is None) == (images is None):
        raise ProblemError(400, "the body must have either `image` or `images`")
    if image is not None:
        return Upload([("image", _from_base64("image", image))], fields)
    if not isinstance(images, list) or not images:
        raise ProblemError(400, "`images` must be a list of base64, and not empty")
    if len(images) > max_images:
        raise ProblemError(400, f"`images` holds {len(images)} images; at most {max_images} do")
    names = [f"images[{place}]" for place in range(len(images))]
    read = [(name, _from_base64(name, one)) for name, one in zip(names, images, strict=True)]
    return Upload(read, fields, many=True)


def _from_base64(name: str, text: object) -> bytes:
    if not isinstance(text, str):
        raise ProblemError(400, f"{name} is {short(text)}, and not base64")
    if text.startswith("data:"):  # as browsers write it
        text = text.partition(",")[2]
    if any(space in text for space in "\r\n\t "):  # tools break long lines
        text = "".join(text.split())
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError(400, f"{name} is not base64: {error}") from error
