"""`multipart/form-data`, parsed from a body that is in memory already."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.core.errors import ProblemError

# Options are short; only files are long.
_MOST_FIELDS = 32
_MOST_FIELD_BYTES = 64 * 1024


@dataclass
class Part:
    """One part of a form.

    Attributes:
        name: Its field.
        filename: None for text.
        content: Its bytes.
    """

    name: str
    filename: str | None
    content: bytes


@dataclass
class _Parts:
    """Collects parts while the parser calls back."""

    max_files: int
    parts: list[Part] = field(default_factory=list)
    ended: bool = False
    _header: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    _pieces: list[bytes] = field(default_factory=list)
    _size: int = 0

    def on_part_begin(self) -> None:
        self._disposition, self._pieces, self._size = b"", [], 0

    def on_header_begin(self) -> None:
        self._header = self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _malformed("a part has no name")
        filename = options.get(b"filename", _extended_filename(self._disposition))
        shown = None if filename is None else _text(filename)
        self.add(Part(_text(options[b"name"]), shown, b""))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])
        self._size += end - start
        if self.parts[-1].filename is None and self._size > _MOST_FIELD_BYTES:
            raise _malformed(f"a field has more than {_MOST_FIELD_BYTES} bytes")

    def on_part_end(self) -> None:
        self.parts[-1].content = b"".join(self._pieces)

    def on_end(self) -> None:
        self.ended = True

    def add(self, part: Part) -> None:
        self.parts.append(part)
        files = sum(part.filename is not None for part in self.parts)
        if files > self.max_files:
            raise _malformed(f"it holds more than {self.max_files} files")
        if len(self.parts) - files > _MOST_FIELDS:
            raise _malformed(f"it holds more than {_MOST_FIELDS} fields")


def parse_form(content_type: str, body: bytes, max_files: int) -> list[Part]:
    """Take a form apart.

    Args:
        content_type: The request's, with its boundary.
        body: All of it.
        max_files: The most files allowed.

    Returns:
        The parts, in order.

    Raises:
        ProblemError: 400 for a form that is malformed, cut short, or has too many parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    parts = _Parts(max_files)
    plain = _plain_parts(boundary, body)
    if plain is not None:
        for part in plain:
            parts.add(part)
        return parts.parts
    names = [name for name in dir(parts) if name.startswith("on_")]
    callbacks = {name: getattr(parts, name) for name in names}
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]  # by name
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _malformed(str(error).splitlines()[0][:200]) from error
    if not parts.ended:
        raise _malformed("it ends too early")
    return parts.parts


# A part as every common client heads it: nothing quoted, encoded or folded.
_PLAIN_HEAD = re.compile(
    rb'Content-Disposition: form-data; name="([\w.-]+)"(?:; filename="([\w.() -]+)")?'
    rb"(?:\r\nContent-Type: [\w.+/-]+(?:; charset=[\w-]+)?)?",
    re.ASCII,
)


def _plain_parts(boundary: bytes, body: bytes) -> list[Part] | None:
    """The parts of a form that has nothing unusual about it; None for others.

    Nearly every form is such a one, and splitting it costs a tenth of what the parser does, which
    looks at it sign by sign.
    """
    delimiter = b"\r\n--" + boundary
    head, tail = delimiter[2:] + b"\r\n", delimiter + b"--\r\n"
    if not (body.startswith(head) and body.endswith(tail)):
        return None
    pieces = body[len(head) : -len(tail)].split(delimiter + b"\r\n")
    if body.count(delimiter) != len(pieces):  # one that ends no part as it should
        return None
    parts = []
    for piece in pieces:
        headers, blank, content = piece.partition(b"\r\n\r\n")
        found = _PLAIN_HEAD.fullmatch(headers)
        if not blank or found is None or (found[2] is None and len(content) > _MOST_FIELD_BYTES):
            return None
        filename = None if found[2] is None else found[2].decode()
        parts.append(Part(found[1].decode(), filename, content))
    return parts


def _extended_filename(disposition: bytes) -> bytes | None:
    """`filename*=UTF-8''name`, which RFC 7578 forbids, some clients send, and the parser drops."""
    found = re.search(rb"filename\*\s*=\s*[\w-]*'[\w-]*'([^;\s]*)", disposition, re.IGNORECASE)
    return None if found is None else unquote_to_bytes(found[1])


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _malformed(why: str) -> ProblemError:
    return ProblemError(400, f"the form is malformed: {why}")
