"""Checkpoints: a detector, the options of its training and its statistics in one file."""

from __future__ import annotations

import hashlib
import pickle
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torchvision
from torch import Tensor

import ghm_triton
from ghm_triton.atomic import write_atomically
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.build import Run
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.evidence import ClassStatistics

CHECKPOINT = "checkpoint.pt"
FORMAT = "ghm-triton checkpoint"
FORMAT_VERSION = 1
SHOWN = 3  # mismatched weights named in an error


class CheckpointError(ValueError):
    """The file is not a checkpoint of this package, or is damaged."""


@dataclass
class Checkpoint:
    """The result of a training run.

    Attributes:
        config: The detector's description.
        model: The detector's `state_dict` (losses' moving averages included).
        statistics: Counts of the training.
        training: Every option of the run (`TrainOptions`), `step` and `versions`; plain values.
        resume: State of the optimiser and the scaler, for a resumed run.
        source: The file that it was read from, for messages.
    """

    config: DetectorConfig
    model: dict[str, Tensor]
    statistics: ClassStatistics
    training: dict[str, Any]
    resume: dict[str, Any] = field(default_factory=dict)
    source: str = "the checkpoint"

    def save(self, path: Path) -> None:
        """Write atomically: a killed run leaves the old file or the new one, whole."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": asdict(self.config),
            "model": self.model,
            "statistics": self.statistics.to_dict(),
            "training": self.training,
            "resume": self.resume,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda stream: torch.save(content, stream))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a checkpoint onto the CPU. Never executes code from the file.

        Raises:
            CheckpointError: The file is missing, is not a checkpoint, is damaged or is newer, or
                its content cannot be used; the message names the file and the value.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such checkpoint") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged, or holds more than weights and plain values, which would"
                " execute code when loaded"
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is a torch file, but not a checkpoint of ghm-triton")
        version = content.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(f"{path}: format_version must be 1 or more, got {version!r:.50}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {version}; this package reads up to {FORMAT_VERSION}"
            )
        for key in ("config", "model", "statistics", "training", "resume"):
            if not isinstance(content.get(key), dict):
                raise CheckpointError(f"{path}: {key} must be a dict, got {content.get(key)!r:.50}")
        with _refused(f"{path}: config cannot be used"):
            config = DetectorConfig.from_dict(content["config"])
        with _refused(f"{path}: statistics cannot be used"):
            statistics = ClassStatistics.from_dict(content["statistics"])
        return cls(
            config=config,
            model=content["model"],
            statistics=statistics,
            training=content["training"],
            resume=content["resume"],
            source=str(path),
        )

    def detector(self) -> Detector:
        """The trained detector, in evaluation mode, without its losses.

        Raises:
            CheckpointError: The weights are not those of the detector that `config` describes.
        """
        detector = build_detector(self.config)
        weights = {k: v for k, v in self.model.items() if not _belongs_to_training(k)}
        misfits = _misfits(detector.state_dict(), weights)
        if misfits:
            shown = "; ".join(misfits[:SHOWN])
            more = f"; and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
            raise CheckpointError(
                f"{self.source}: the weights do not fit a {self.config.architecture} detector with"
                f" backbone {self.config.backbone}, as this version builds it: {shown}{more}"
            )
        detector.load_state_dict(weights)
        detector.eval()
        return detector


def save_run(run: Run) -> None:
    """Write the checkpoint of a run, from which it can be resumed."""
    Checkpoint(
        config=run.config,
        model={k: v.cpu() for k, v in run.detector.state_dict().items()},
        statistics=run.statistics,
        training={**run.options.to_dict(), "step": run.step, "versions": versions()},
        resume={"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()},
    ).save(run.out / CHECKPOINT)


def resume_run(run: Run) -> None:
    """Load the checkpoint of a run into it.

    Raises:
        CheckpointError: There is none, or it is damaged.
        ValueError: It holds another detector, or was trained with other options.
    """
    saved = Checkpoint.load(run.out / CHECKPOINT)
    if saved.config != run.config:
        raise ValueError(f"{run.out / CHECKPOINT} holds another detector: {saved.config}")
    with _refused(f"{saved.source}: training cannot be used"):
        before = TrainOptions.of_run(saved.training).settled(run.config.architecture).to_dict()
        step = int(saved.training["step"])
    now = run.options.to_dict()
    changed = {
        key: (old, now[key])
        for key, old in before.items()
        if old != now[key] and key not in ("workers", "checkpoint_every")
    }
    if changed:
        raise ValueError(f"cannot resume with other options (old, new): {changed}")
    with _refused(f"{saved.source} cannot be resumed"):
        run.detector.load_state_dict(saved.model)
        run.optimizer.load_state_dict(saved.resume["optimizer"])
        run.scaler.load_state_dict(saved.resume["scaler"])
    run.statistics = saved.statistics
    run.step = step


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raise the errors of reading content of a wrong kind as a `CheckpointError` of one line."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{what}: {error} is missing") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{what}: {reason[:300]}") from error


def versions() -> dict[str, str]:
    """The versions that a checkpoint was made with."""
    return {
        "ghm_triton": ghm_triton.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which safe loading refuses
        "torchvision": torchvision.__version__,
    }


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file in hex, by which a card names its checkpoint."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _misfits(expected: dict[str, Tensor], weights: dict[str, Any]) -> list[str]:
    """The reasons why weights cannot be loaded: expected ones first, in the order of layers."""
    misfits = []
    for key, weight in expected.items():
        other = weights.get(key)
        if other is None:
            misfits.append(f"{key!r} is missing")
        elif not isinstance(other, Tensor):
            misfits.append(f"{key!r} is {type(other).__name__}, not a tensor")
        elif other.shape != weight.shape:
            misfits.append(f"{key!r} is {list(other.shape)}, not {list(weight.shape)}")
    return misfits + [f"{key!r} has no place" for key in weights if key not in expected]


def _belongs_to_training(key: str) -> bool:
    parts = ("classification_loss.", "regression_loss.", "guide.", "mining.", "adversary.")
    return any(part in key for part in parts)
