"""Ranges of the activations in a network, observed on images."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto
from onnx.utils import Extractor
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

from export.card import INPUT
from export.quantize.core import Core

Image = npt.NDArray[np.float32]
BINS = 2048


def observe_ranges(model: ModelProto, core: Core, images: Iterable[Image], coverage: float) -> Any:
    """Observe the range of every activation that the core reads or computes.

    Args:
        model: A detector's graph, float32.
        core: Its core.
        images: Prepared images, float32 `[3, H, W]`, read one at a time; at least one.
        coverage: Per cent of an activation's values, over all images, within its range; half of
            the rest is cut off at either end. 100 covers every value.

    Returns:
        onnxruntime's `TensorsData`.

    Raises:
        ValueError: There are no images.
    """
    method = CalibrationMethod.MinMax if coverage == 100 else CalibrationMethod.Percentile
    options = {"num_bins": BINS, "percentile": coverage, "symmetric": False}
    with tempfile.TemporaryDirectory(prefix="ghm.calibrate.") as folder:
        path = Path(folder, "upstream.onnx")
        onnx.save_model(_upstream(model, core), path)
        calibrator = create_calibrator(
            path,
            core.op_types,
            augmented_model_path=str(path.with_name("observed.onnx")),
            calibrate_method=method,
            extra_options={} if coverage == 100 else options,
        )
        seen = 0
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per image
            for image in images:  # one at a time, because it keeps all activations in memory
                calibrator.collect_data(_One({INPUT: image[None]}))
                seen += 1
            if not seen:
                raise ValueError("there are no images to calibrate on")
            return calibrator.compute_data()


class _One(CalibrationDataReader):  # type: ignore[misc]
    """A reader of one set of inputs."""

    def __init__(self, feeds: dict[str, Image]) -> None:
        self._left = [feeds]

    def get_next(self) -> dict[str, Image] | None:
        return self._left.pop() if self._left else None


def _upstream(model: ModelProto, core: Core) -> ModelProto:
    """The part of the graph that the core depends on."""
    whole = onnx.shape_inference.infer_shapes(model)
    defaults = {tensor.name for tensor in whole.graph.initializer}
    needed = [value.name for value in whole.graph.input if value.name not in defaults]
    results = [name for node in core.nodes for name in node.output]
    part = Extractor(whole).extract_model(needed, results)
    constant = [value for value in part.graph.input if value.name in defaults]
    for value in constant:  # onnxruntime warns of inputs with defaults
        part.graph.input.remove(value)
    return part
