"""onnxruntime sessions on the CPU."""

from __future__ import annotations

from typing import Any

import onnxruntime

ERRORS, FATAL = 3, 4


def open_session(content: bytes, *, threads: int = 0, log_severity: int = ERRORS) -> Any:
    """Load a model into onnxruntime, on the CPU.

    Args:
        content: The serialized model.
        threads: Threads within an operator; 0 for one per core.
        log_severity: Lowest severity that onnxruntime logs. Warnings are left out: there is one
            for each initializer that callers can override.

    Returns:
        An `onnxruntime.InferenceSession`.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_severity
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
