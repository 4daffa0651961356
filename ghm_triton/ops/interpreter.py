"""Triton's interpreter, which runs kernels on the CPU."""

import os


def interpreting() -> bool:
    """Whether Triton interprets its kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
