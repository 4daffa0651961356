"""A digest at the very end of a file, by which damage to any bit of it shows.

onnx's own metadata holds it, so runtimes see nothing new. Its place is one that no tool gives it:
behind it, the IR version is said a second time, as protobuf allows. A tool that writes the file
anew moves both, and what it changed on purpose is not mistaken for damage.
"""

from __future__ import annotations

import hashlib

from onnx import ModelProto

SEAL_KEY = "ghm.sha256"
_DIGITS = 64


def seal(content: bytes, ir_version: int) -> bytes:
    """A serialized model with its digest behind it.

    Args:
        content: The model, serialized, without a seal.
        ir_version: The model's, below 128.
    """
    return content + _tail(hashlib.sha256(content).hexdigest(), ir_version)


def is_broken(content: bytes) -> bool:
    """Whether a file ends in a digest, and that of something else than the file.

    False for a file without one, as others write it.
    """
    length = len(_tail("0" * _DIGITS, 1))
    body, tail = content[:-length], content[-length:]
    try:
        digest = tail[-2 - _DIGITS : -2].decode("ascii")
        sealed = tail == _tail(digest, tail[-1])
    except (IndexError, ValueError):
        return False
    return sealed and hashlib.sha256(body).hexdigest() != digest


def _tail(digest: str, ir_version: int) -> bytes:
    entry, again = ModelProto(), ModelProto(ir_version=ir_version)
    entry.metadata_props.add(key=SEAL_KEY, value=digest)
    tail: bytes = entry.SerializeToString() + again.SerializeToString()
    return tail
