"""Reading a request's body, and no more of it than allowed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

from service.problems import ProblemError, short

# Options are short; only files are long.
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Upload:
    """What a request brought.

    Attributes:
        images: A name for use in errors, and the bytes, of each image.
        fields: The form's other fields, in order.
        many: Whether the client asked with `files`, so that the answer is a list.
    """

    images: list[tuple[str, bytes]]
    fields: list[tuple[str, str]]
    many: bool = False


async def read_upload(request: Request, max_bytes: int, max_images: int) -> Upload:
    """Read the images and form fields of a request.

    Args:
        request: With a body that is one image, or `multipart/form-data` with one `file` or any
            number of `files`.
        max_bytes: The most bytes to read, whatever `Content-Length` says.
        max_images: The most files in a form.

    Returns:
        The images and the fields.

    Raises:
        ProblemError: 400 for a form that is malformed or has no image, 413 for a body that is too
            large, 415 for a `Content-Type` that is neither an image nor a form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, max_bytes, max_images)
    if kind in ("", "application/octet-stream") or kind.startswith("image/"):
        return Upload([("the body", await _read_all(request, max_bytes))], [])
    raise ProblemError(
        415,
        f"Content-Type is {short(kind)}; send one image as image/* or application/octet-stream,"
        " or files as multipart/form-data",
    )


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks, until they are too many."""
    promised = request.headers.get("content-length", "")
    if promised.isdecimal() and int(promised) > max_bytes:
        raise _too_large(max_bytes)
    total = 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            total += len(chunk)
            if total > max_bytes:
                raise _too_large(max_bytes)
            yield chunk


def _too_large(max_bytes: int) -> ProblemError:
    return ProblemError(413, f"the body is larger than the {max_bytes} bytes that are read here")


async def _read_all(request: Request, max_bytes: int) -> bytes:
    async with aclosing(_limited(request, max_bytes)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def _read_form(request: Request, max_bytes: int, max_images: int) -> Upload:
    form = await _parse_form(request, max_bytes, max_images)
    try:
        files = [(name, value) for name, value in form.multi_items() if not isinstance(value, str)]
        fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        many = _is_many([name for name, _ in files], [name for name, _ in fields])
        images = [
            (_name(field, place, file.filename), await file.read())
            for place, (field, file) in enumerate(files)
        ]
    finally:
        await form.close()
    return Upload(images, fields, many)


async def _parse_form(request: Request, max_bytes: int, max_images: int) -> FormData:
    async with aclosing(_limited(request, max_bytes)) as chunks:
        parser = MultiPartParser(
            request.headers,
            chunks,
            max_files=max_images,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise ProblemError(400, f"the form is malformed: {error.message}") from error


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


def _name(field: str, place: int, filename: str | None) -> str:
    return f"files[{place}] {short(filename)}" if field == "files" else f"file {short(filename)}"
