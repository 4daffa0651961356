"""The detector in memory: an onnxruntime session that keeps to its file's card."""

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

_ERRORS_ONLY = 3  # onnxruntime warns of every overridable initializer


class ModelError(RuntimeError):
    """The runtime cannot load or run this detector, or not on what was asked for."""


class ServedModel:
    """A detector that answers. Safe to call from several threads at once.

    Args:
        file: The detector, as `export.file.read_detector` returns it.
        provider: `auto`, `cpu` or `cuda`. `auto` takes CUDA where it works and the CPU elsewhere.
        threads: Threads of all its inferences on the CPU.
        spin: Whether threads that wait for work keep a processor busy. That makes the inference of
            one request faster, and takes the processors from others that run at the same time.
        name: What requests call it; the card's name where None.
        version: Which of the models of this name it is.

    Attributes:
        name: What requests call it.
        version: Which of the models of this name it is.
        card: The detector's card.
        sha256: The digest of its file.
        providers: What runs it, in order of preference, by onnxruntime's names.
        warm: Whether it has answered once.

    Raises:
        ModelError: The runtime refuses the graph, or CUDA was asked for and does not work here.
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

    def warm_up(self) -> None:
        """Answer for one grey image, so that the first request does not pay for first things.

        Raises:
            ModelError: The graph does not run, or not as the contract says.
        """
        height, width = self.card.preprocessing.height, self.card.preprocessing.width
        if self.card.input == "uint8":
            self.detect(np.zeros((1, height, width, 3), dtype=np.uint8))
        else:
            self.detect(np.zeros((1, 3, height, width), dtype=np.float32))
        self.warm = True

    def detect(
        self,
        batch: npt.NDArray[Any],
        class_thresholds: npt.NDArray[np.float32] | None = None,
        iou_threshold: float | None = None,
    ) -> list[Detections]:
        """Find objects in a batch of images: `run`, taken apart.

        Args:
            batch: As `run` takes it.
            class_thresholds: As `run` takes them.
            iou_threshold: As `run` takes it.

        Returns:
            One entry an image.

        Raises:
            ValueError: An input has another shape or type, or holds NaN or infinity.
            ModelError: The runtime fails, or the graph answers with something else than the
                contract says.
        """
        outputs = self.run(batch, class_thresholds, iou_threshold)
        return [outputs.image(place) for place in range(len(outputs))]

    def run(
        self,
        batch: npt.NDArray[Any],
        class_thresholds: npt.NDArray[np.float32] | None = None,
        iou_threshold: float | None = None,
    ) -> Outputs:
        """Run the graph on a batch of images.

        Args:
            batch: Images as the card's `input` says: float32 `[B, 3, H, W]`, prepared
                (`service.images.decode.letterbox`), or uint8 RGB `[B, height, width, 3]` of any
                size.
            class_thresholds: float32 `[C]`, the score that a detection of each class must reach;
                the card's where None. `OFF` switches a class off.
            iou_threshold: Of two boxes of a class that overlap by more, the lesser falls, in
                [0, 1]; the card's where None.

        Returns:
            The graph's outputs, found to be what the contract says.

        Raises:
            ValueError: An input has another shape or type, or holds NaN or infinity.
            ModelError: The runtime fails, or the graph answers with something else than the
                contract says.
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
            outputs = Outputs(*self._session.run(list(OUTPUTS), feeds))
        except Exception as error:
            raise ModelError(f"inference failed: {error}") from error
        self._check_outputs(outputs, len(batch))
        return outputs

    def _check_batch(self, batch: npt.NDArray[Any]) -> None:
        size = self.card.preprocessing
        if self.card.input == "uint8":
            wanted, fits = "height, width, 3", batch.shape[3:] == (3,) and 0 not in batch.shape[1:]
        else:
            wanted = f"3, {size.height}, {size.width}"
            fits = batch.shape[1:] == (3, size.height, size.width)
        if batch.dtype != self.card.input or not fits:
            raise ValueError(
                f"images must be {self.card.input} [B, {wanted}],"
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
        """Padding is checked too: it is finite, and its label is -1."""
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
    options.log_severity_level = _ERRORS_ONLY
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            file.content, options, providers=_wanted_providers(provider)
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{file.path}: onnxruntime cannot load it: {error}") from error
    # Without this the session changes providers by itself when one fails in the middle.
    session.disable_fallback()
    got = session.get_providers()
    # onnxruntime answers with a CPU session, not with an error, where CUDA does not load.
    if provider == "cuda" and CUDA not in got:
        raise ModelError(
            f"provider cuda does not work here: onnxruntime {onnxruntime.__version__} fell back to"
            f" {', '.join(got)}. Are the CUDA libraries it needs installed?"
        )
    if provider == "auto":
        logger.info("the model runs on %s", got[0])
    return session


def _wanted_providers(provider: str) -> list[Any]:
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
    """Ask the driver, quietly; onnxruntime lists CUDA whether or not there is a device."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return False
    count = ctypes.c_int()
    started = driver.cuInit(0) == 0
    return started and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
