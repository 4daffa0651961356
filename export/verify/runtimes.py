"""What runs a detector's file on a CPU: onnxruntime, OpenVINO, and onnx's own reference.

The three share no code, so a file on whose answers they agree means what ONNX says it means.
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

from export.card import INPUT, OUTPUTS
from export.file import DetectorFile
from export.thresholds import set_default

Array = npt.NDArray[Any]
ALL = "all"


class MissingRuntimeError(ValueError):
    """A runtime was asked for that is not there."""


class UnrunnableError(RuntimeError):
    """A runtime cannot load or run the file."""


class Runtime(ABC):
    """A file, loaded for the CPU.

    Args:
        file: The detector.

    Attributes:
        name: What it is asked for by.
        package: What it is imported as.
        extra: The extra of `ghm-triton` that brings it.
        slow: Whether a comparison on many images takes it minutes.

    Raises:
        UnrunnableError: The runtime refuses the file.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str] = "export"
    slow: ClassVar[bool] = False

    def __init__(self, file: DetectorFile) -> None:
        try:
            self._load(file)
        except Exception as error:  # their errors share no class
            raise UnrunnableError(f"{self.name} refuses the file: {error}") from error

    def run(self, batch: Array, overrides: Mapping[str, npt.NDArray[np.float32]]) -> list[Array]:
        """Detect.

        Args:
            batch: `images`, as the file's card says.
            overrides: Values for `class_thresholds` and `iou_threshold` instead of the file's.

        Returns:
            The contract's outputs, in its order.

        Raises:
            UnrunnableError: The runtime fails.
        """
        try:
            return self._run(batch, overrides)
        except Exception as error:
            place = f"a batch of {len(batch)}"
            raise UnrunnableError(f"{self.name} fails on {place}: {error}") from error

    @classmethod
    def missing(cls) -> bool:
        """Whether it is not installed."""
        return find_spec(cls.package) is None

    @classmethod
    def title(cls) -> str:
        """Its name and version."""
        number = str(import_module(cls.package).__version__)
        return f"{cls.name} {number.partition('-')[0]}"  # OpenVINO appends its build

    @abstractmethod
    def _load(self, file: DetectorFile) -> None: ...

    @abstractmethod
    def _run(self, batch: Array, overrides: Mapping[str, Array]) -> list[Array]: ...


class OnnxRuntime(Runtime):
    """onnxruntime, which takes overrides as inputs."""

    name = package = "onnxruntime"

    def _load(self, file: DetectorFile) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every initializer that can be overridden
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(file.content, options, providers=providers)

    def _run(self, batch: Array, overrides: Mapping[str, Array]) -> list[Array]:
        answer: list[Array] = self.session.run(list(OUTPUTS), {INPUT: batch, **overrides})
        return answer


class OpenVino(Runtime):
    """OpenVINO, which bakes thresholds in: others take a model with its defaults rewritten."""

    name = package = extra = "openvino"

    def _load(self, file: DetectorFile) -> None:
        self.model = onnx.load_model_from_string(file.content)
        self._compile({})

    def _compile(self, overrides: Mapping[str, Array]) -> None:
        import openvino

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name, values in overrides.items():
            set_default(model, name, values.tolist())
        content = model.SerializeToString()
        # Its default rounds to bfloat16 where the processor can.
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(content), "CPU", precise)
        self.baked_in = _fingerprint(overrides)

    def _run(self, batch: Array, overrides: Mapping[str, Array]) -> list[Array]:
        if self.baked_in != _fingerprint(overrides):
            self._compile(overrides)
        answer = self.compiled({INPUT: batch}, share_outputs=False)  # or calls overwrite it
        return [np.asarray(answer[name]) for name in OUTPUTS]


class Reference(Runtime):
    """onnx's reference in numpy: the standard's word on what a graph means, and slow."""

    name, package = "reference", "onnx"
    slow = True

    def _load(self, file: DetectorFile) -> None:
        from onnx.reference import ReferenceEvaluator

        self.evaluator = ReferenceEvaluator(onnx.load_model_from_string(file.content))

    def _run(self, batch: Array, overrides: Mapping[str, Array]) -> list[Array]:
        with np.errstate(all="ignore"):  # a sigmoid's exp overflows to the right answer
            answer = self.evaluator.run(list(OUTPUTS), {INPUT: batch, **overrides})
        return [np.asarray(values) for values in answer]


RUNTIMES: tuple[type[Runtime], ...] = (OnnxRuntime, OpenVino, Reference)
RUNTIME_NAMES = tuple(runtime.name for runtime in RUNTIMES)


def find_runtimes(names: Sequence[str]) -> tuple[list[type[Runtime]], list[type[Runtime]]]:
    """The runtimes asked for.

    Args:
        names: Of `RUNTIME_NAMES`, or `all`: whatever is installed.

    Returns:
        Those that are there, in the order of `RUNTIMES`; and, for `all`, those that are missing.

    Raises:
        MissingRuntimeError: One that was asked for by name is not installed.
        ValueError: There is no such runtime, or none was asked for.
    """
    known = (*RUNTIME_NAMES, ALL)
    if not names:
        raise ValueError(f"no runtime asked for; known: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown runtime {name!r}; known: {', '.join(known)}")
    there, absent = [], []
    for runtime in RUNTIMES:
        if ALL not in names and runtime.name not in names:
            continue
        if not runtime.missing():
            there.append(runtime)
        elif runtime.name in names:
            raise MissingRuntimeError(f"{runtime.name} is not installed: {how_to_install(runtime)}")
        else:
            absent.append(runtime)
    return there, absent


def how_to_install(runtime: type[Runtime]) -> str:
    """The command that brings a runtime."""
    return f"pip install 'ghm-triton[{runtime.extra}]'"


def _fingerprint(overrides: Mapping[str, Array]) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in overrides.items()}
