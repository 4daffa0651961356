"""CPU runtimes for a detector's file: onnxruntime, OpenVINO, and onnx's reference evaluator.

The three share no code. Where their outputs agree, the file computes what the ONNX standard
defines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from export.card import INPUT, OUTPUTS
from export.file import DetectorFile, set_default
from ghm_triton.extras import how_to_install

Array = npt.NDArray[Any]
Overrides = Mapping[str, npt.NDArray[np.float32]]
ALL = "all"
ERRORS, FATAL = 3, 4


class MissingRuntimeError(ValueError):
    """A runtime that was requested by name is not installed."""


class UnrunnableError(RuntimeError):
    """A runtime cannot load or run the file."""


def open_session(content: bytes, *, threads: int = 0, log_severity: int = ERRORS) -> Any:
    """Load a serialized model into an `onnxruntime.InferenceSession`, on the CPU.

    Args:
        content: The model.
        threads: Threads within an operator; 0 for one per core.
        log_severity: Lowest severity that onnxruntime logs. Warnings are left out: there is one
            for each initializer that callers can override.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_severity
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class Runtime(ABC):
    """A detector's file, loaded for the CPU; raises UnrunnableError if the runtime refuses it.

    Attributes:
        name: The name that `find_runtimes` takes.
        package: The package to import.
        extra: The extra of `ghm-triton` that installs it.
        slow: Whether comparing many images takes minutes.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str] = "export"
    slow: ClassVar[bool] = False

    def __init__(self, file: DetectorFile) -> None:
        try:
            self._load(file.content)
        except Exception as error:  # the runtimes' exceptions have no common base
            raise UnrunnableError(f"{self.name} refuses the file: {error}") from error

    def run(self, batch: Array, overrides: Overrides) -> list[Array]:
        """Detect objects in a batch of images.

        Args:
            batch: `images`, of the shape and type that the file's card describes.
            overrides: `class_thresholds` and `iou_threshold`; the file's defaults where absent.

        Returns:
            The arrays named in `export.card.OUTPUTS`, in that order.

        Raises:
            UnrunnableError: The runtime fails.
        """
        try:
            return self._run(batch, overrides)
        except Exception as error:
            raise UnrunnableError(
                f"{self.name} fails on a batch of {len(batch)}: {error}"
            ) from error

    @classmethod
    def title(cls) -> str:
        """Name and version."""
        number = str(import_module(cls.package).__version__)
        return f"{cls.name} {number.partition('-')[0]}"  # OpenVINO appends its build

    @abstractmethod
    def _load(self, content: bytes) -> None: ...

    @abstractmethod
    def _run(self, batch: Array, overrides: Overrides) -> list[Array]: ...


class OnnxRuntime(Runtime):
    """onnxruntime, which takes overrides as inputs."""

    name = package = "onnxruntime"

    def _load(self, content: bytes) -> None:
        self.session = open_session(content)

    def _run(self, batch: Array, overrides: Overrides) -> list[Array]:
        outputs: list[Array] = self.session.run(list(OUTPUTS), {INPUT: batch, **overrides})
        return outputs


class OpenVino(Runtime):
    """OpenVINO, which compiles defaults in: overrides need a model with other initializers."""

    name = package = extra = "openvino"

    def _load(self, content: bytes) -> None:
        self.model = onnx.load_model_from_string(content)
        self._compile({})

    def _compile(self, overrides: Mapping[str, list[float]]) -> None:
        import openvino

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name, values in overrides.items():
            set_default(model, name, values)
        core = openvino.Core()
        # By default OpenVINO rounds to bfloat16 where the processor supports it.
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        loaded = core.read_model(model.SerializeToString())
        self.compiled = core.compile_model(loaded, "CPU", precise)
        self.compiled_with = overrides

    def _run(self, batch: Array, overrides: Overrides) -> list[Array]:
        values = {name: array.tolist() for name, array in overrides.items()}
        if values != self.compiled_with:
            self._compile(values)
        # Outputs that are shared would be overwritten by the next call.
        outputs = self.compiled({INPUT: batch}, share_outputs=False)
        return [np.asarray(outputs[name]) for name in OUTPUTS]


class Reference(Runtime):
    """onnx's reference evaluator in numpy, which defines the operators, and is slow."""

    name, package = "reference", "onnx"
    slow = True

    def _load(self, content: bytes) -> None:
        from onnx.reference import ReferenceEvaluator

        self.evaluator = ReferenceEvaluator(onnx.load_model_from_string(content))

    def _run(self, batch: Array, overrides: Overrides) -> list[Array]:
        with np.errstate(all="ignore"):  # the exp of a sigmoid overflows to the right result
            outputs = self.evaluator.run(list(OUTPUTS), {INPUT: batch, **overrides})
        return [np.asarray(values) for values in outputs]


RUNTIMES: tuple[type[Runtime], ...] = (OnnxRuntime, OpenVino, Reference)
RUNTIME_NAMES = tuple(runtime.name for runtime in RUNTIMES)


def find_runtimes(names: Sequence[str]) -> tuple[list[type[Runtime]], dict[str, str]]:
    """Look runtimes up by name.

    Args:
        names: Entries of `RUNTIME_NAMES`, or `all` for those that are installed.

    Returns:
        The runtimes found, in the order of `RUNTIMES`; and, for `all`, how to install the others.

    Raises:
        MissingRuntimeError: A runtime requested by name is not installed.
        ValueError: A name is unknown, or there are no names.
    """
    known = (*RUNTIME_NAMES, ALL)
    if not names:
        raise ValueError(f"no runtime asked for; known: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown runtime {name!r}; known: {', '.join(known)}")
    found, missing = [], {}
    for runtime in RUNTIMES:
        if ALL not in names and runtime.name not in names:
            continue
        if find_spec(runtime.package) is not None:
            found.append(runtime)
        elif runtime.name in names:
            raise MissingRuntimeError(
                f"{runtime.name} is not installed: {how_to_install(runtime.extra)}"
            )
        else:
            missing[runtime.name] = how_to_install(runtime.extra)
    return found, missing
