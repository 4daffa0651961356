"""Fuzzing targets for bodies and images, for `benchmarks.fuzz_service`."""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Callable

from benchmarks.fuzz_json import mutate_json
from ghm_triton.images.decode import decode
from ghm_triton.images.header import ImageError
from service.core.detections import DetectOptions, read_options
from service.core.errors import ProblemError
from service.http import bodies

MAX_PIXELS = 2**20
_PNG = b"\x89PNG\r\n\x1a\n"

Mutate = Callable[[bytes, random.Random, list[bytes]], bytes]


# Text that a refusal quotes from a case; refusals that differ only in it are one outcome.
_QUOTED = re.compile(r"(unknown option |names? |named |form: |is ).*")


def _plain(error: ProblemError) -> ProblemError:
    return ProblemError(error.status, _QUOTED.sub(r"\1#", error.detail))


def read_image(case: bytes) -> None:
    """Run a case that is an image file."""
    try:
        image = decode(case, MAX_PIXELS)
    except ImageError as error:
        raise ProblemError(400, f"{type(error).__name__} {error}") from error
    if image.mode != "RGB" or not 0 < image.width * image.height <= MAX_PIXELS:
        raise AssertionError(f"decoded to {image.mode} of {image.size}")


def read_form(case: bytes) -> None:
    """Run a case of a Content-Type, a line feed and a form."""
    content_type, _, body = case.partition(b"\n")
    try:
        upload = bodies.read_form(content_type.decode("latin-1"), body, 4)
        read_options(upload.fields, DetectOptions)
    except ProblemError as error:
        raise _plain(error) from error


def read_json(case: bytes) -> None:
    """Run a case that is a JSON body."""
    try:
        read_options(bodies.read_json(case, 4).fields, DetectOptions)
    except ProblemError as error:
        raise _plain(error) from error


def mutate_image(mutate: Mutate) -> Mutate:
    """Mutate bytes; the checksums of a PNG are mostly corrected afterwards."""

    def mutated(case: bytes, chance: random.Random, others: list[bytes]) -> bytes:
        made = mutate(case, chance, others)
        return _checked(made) if made.startswith(_PNG) and chance.random() < 0.7 else made

    return mutated


def mutate_json_body(mutate: Mutate) -> Mutate:
    """Mutate the values of JSON or its bytes."""

    def mutated(case: bytes, chance: random.Random, others: list[bytes]) -> bytes:
        try:
            value = json.loads(case)
        except (ValueError, RecursionError):
            return mutate(case, chance, others)
        if chance.random() < 0.3:
            return mutate(case, chance, others)
        return json.dumps(mutate_json(value, chance), separators=(",", ":")).encode()

    return mutated


def _checked(png: bytes) -> bytes:
    """Correct the checksum of every chunk of a PNG."""
    made, place = bytearray(png), len(_PNG)
    while place + 12 <= len(made):
        (length,) = struct.unpack_from(">I", made, place)
        end = place + 8 + length
        if end + 4 > len(made):
            break
        struct.pack_into(">I", made, end, zlib.crc32(made[place + 4 : end]))
        place = end + 4
    return bytes(made)
