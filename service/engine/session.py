"""A detector in memory: an onnxruntime session, checked against its file's card."""

from __future__ import annotations

import ctypes
import logging
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from export.card import INPUT, IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT, DetectorCard
from export.file import DetectorFile
from service.core.detections import Detections, Outputs

logger = logging.getLogger("ghm.service")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# onnxruntime's errors are raised as well; its log would put lines on stderr that are not JSON.
_FATAL = 4
onnxruntime.set_default_logger_severity(_FATAL)


class ModelError(RuntimeError):
    """The runtime cannot load or run a detector, or not with the requested provider."""


class ServedModel:
    """A loaded detector. Thread-safe.

    Args:
        file: The detector, from `export.file.read_detector`.
        provider: `auto`, `cpu` or `cuda`. `auto` uses CUDA where it works, else the CPU.
        threads: Number of threads shared by all inferences on the CPU.
        spin: Whether threads busy-wait for work. That shortens a single inference and takes the
            processors from others that run at the same time.
        name: Name in requests; None for the card's.
        version: Version in requests.

    Attributes:
        name: Name in requests.
        version: Version in requests.
        card: The detector's card.
        sha256: Digest of the file.
        providers: Execution providers in use, in order of preference, by onnxruntime's names.
        warm: Whether it has run once.

    Raises:
        ModelError: The runtime refuses the graph, or `cuda` was requested and does not work.
    """

    def __init__(
        self,
        file: DetectorFile,
        *,
        provider: str = "auto",
        threads: int = 1,
        spin: bool = True,
        name: str | None = None,
        version: str = "1",
    ) -> None:
        self.card: DetectorCard = file.card
        self.name = file.card.name if name is None else name
        self.version = version
        self.sha256 = file.sha256
        self.warm = False
        self._session = _session(file, provider, threads, spin)
        self.providers: list[str] = self._session.get_providers()
        self._thresholds = np.array(file.card.class_thresholds, dtype=np.float32)

    def warm_up(self, options: onnxruntime.RunOptions | None = None) -> None:
        """Run once on a grey image, so that the first request does not pay for initialization.

        Args:
            options: As for `run`.

        Raises:
            ModelError: The graph does not run, or its outputs break the contract.
        """
        height, width = self.card.preprocessing.height, self.card.preprocessing.width
        if self.card.input == "uint8":
            self.run(np.zeros((1, height, width, 3), dtype=np.uint8), options=options)
        else:
            self.run(np.zeros((1, 3, height, width), dtype=np.float32), options=options)
        self.warm = True

    def detect(
        self,
        batch: npt.NDArray[Any],
        class_thresholds: npt.NDArray[np.float32] | None = None,
        iou_threshold: float | None = None,
    ) -> list[Detections]:
        """Detect objects in a batch of images: `run`, with one result per image."""
        outputs = self.run(batch, class_thresholds, iou_threshold)
        return [outputs.image(index) for index in range(len(outputs))]

    def run(
        self,
        batch: npt.NDArray[Any],
        class_thresholds: npt.NDArray[np.float32] | None = None,
        iou_threshold: float | None = None,
        *,
        options: onnxruntime.RunOptions | None = None,
    ) -> Outputs:
        """Run the graph on a batch of images.

        Args:
            batch: Images of the card's `input` type: float32 `[B, 3, H, W]`, normalised
                (`service.images.letterbox`), or uint8 RGB `[B, height, width, 3]` of any
                size.
            class_thresholds: float32 `[C]`, minimum score per class; None for the card's. `OFF`
                switches a class off.
            iou_threshold: IoU above which NMS drops the lower-scored box of a class, in [0, 1];
                None for the card's.
            options: Setting `terminate` on them ends the run with a `ModelError` after the
                operator that is running.

        Returns:
            The graph's outputs, checked against the contract.

        Raises:
            ValueError: An input has the wrong shape or dtype, or holds NaN or infinity.
            ModelError: The runtime fails, or the outputs break the contract.
        """
        self._check_batch(batch)
        feeds: dict[str, npt.NDArray[Any]] = {INPUT: batch}
        if class_thresholds is not None:
            feeds[THRESHOLDS_INPUT] = self._checked_thresholds(class_thresholds)
        if iou_threshold is not None:
            if not 0 <= iou_threshold <= 1:
                raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
            feeds[IOU_INPUT] = np.array([iou_threshold], dtype=np.float32)
        try:
            outputs = Outputs(*self._session.run(list(OUTPUTS), feeds, options))
        except Exception as error:
            raise ModelError(f"inference failed: {error}") from error
        self._check_outputs(outputs, len(batch))
        return outputs

    def _check_batch(self, batch: npt.NDArray[Any]) -> None:
        size = self.card.preprocessing
        if self.card.input == "uint8":
            expected = "height, width, 3"
            fits = batch.shape[3:] == (3,) and 0 not in batch.shape[1:]
        else:
            expected = f"3, {size.height}, {size.width}"
            fits = batch.shape[1:] == (3, size.height, size.width)
        if batch.dtype != self.card.input or not fits:
            raise ValueError(
                f"images must be {self.card.input} [B, {expected}],"
                f" got {batch.dtype} {list(batch.shape)}"
            )
        if len(batch) == 0:
            raise ValueError("images is an empty batch")
        if self.card.input == "float32" and not np.isfinite(batch).all():
            raise ValueError("images holds NaN or infinity")  # the graph would find nothing

    def _checked_thresholds(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if values.dtype != np.float32 or values.shape != self._thresholds.shape:
            raise ValueError(
                f"class_thresholds must be float32 {list(self._thresholds.shape)},"
                f" got {values.dtype} {list(values.shape)}"
            )
        if not np.isfinite(values).all() or values.min() < 0:
            raise ValueError(f"class_thresholds must be finite and not negative, got {values}")
        return values

    def _check_outputs(self, outputs: Outputs, images: int) -> None:
        """Check the outputs, their padding included: it is finite, and its label is -1."""
        numbers, labels = outputs.num_detections, outputs.labels
        whole = len(outputs) == images and outputs.boxes.shape == (*labels.shape, 4)
        if not whole or numbers.min() < 0 or numbers.max() > labels.shape[1]:
            raise ModelError("the graph answered with outputs of another shape than the contract's")
        standing = np.arange(labels.shape[1]) < numbers[:, None]
        known = np.where(standing, labels >= 0, labels == -1).all()
        known = known and labels.max(initial=-1) < len(self._thresholds)
        if not (known and np.isfinite(outputs.boxes).all() and np.isfinite(outputs.scores).all()):
            raise ModelError("the graph answered with a box, score or label out of range")


def _session(
    file: DetectorFile, provider: str, threads: int, spin: bool
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            file.content, options, providers=_providers(provider)
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{file.path}: onnxruntime cannot load it: {error}") from error
    # Otherwise the session switches providers by itself when one fails during a run.
    session.disable_fallback()
    got = session.get_providers()
    # onnxruntime returns a CPU session, not an error, where CUDA does not load.
    if provider == "cuda" and CUDA not in got:
        raise ModelError(
            f"provider cuda does not work here: onnxruntime {onnxruntime.__version__} fell back to"
            f" {', '.join(got)}. Are the CUDA libraries it needs installed?"
        )
    if provider == "auto":
        logger.info("the model runs on %s", got[0])
    return session


def _providers(provider: str) -> list[Any]:
    if provider == "cpu":
        return [CPU]
    built_in = CUDA in onnxruntime.get_available_providers()
    missing = None if built_in else "this onnxruntime is built without it"
    if built_in and not _has_cuda_device():
        missing = "no NVIDIA driver or no device was found"
    if missing is None:
        if hasattr(onnxruntime, "preload_dlls"):  # finds the CUDA libraries of Python packages
            onnxruntime.preload_dlls()
        return [CUDA, CPU]
    if provider == "cuda":
        raise ModelError(f"provider cuda does not work here: {missing}")
    return [CPU]


def _has_cuda_device() -> bool:
    """Query the driver: onnxruntime lists CUDA whether or not there is a device."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return False
    count = ctypes.c_int()
    started = driver.cuInit(0) == 0
    return started and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
