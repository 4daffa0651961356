"""A run of the study and its key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks.result_file import Row
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.config import TrainOptions

# Placeholder: the classes of a data set are known only once it is opened.
ANY_CLASSES = ("object",)
# Fields of their own in a row, or without effect on the result.
APART = ("data", "seed", "steps", "batch_size", "workers", "checkpoint_every")
CONFIG_APART = ("class_names", "architecture", "image_size", "channels")
DENSITY_LOSSES = ("ghm", "ghm-softmax")


@dataclass(frozen=True)
class Run:
    """One training, in its place in a grid.

    Attributes:
        grid: Name of the grid.
        section: Name of the section.
        method: Name of the method.
        options: Options of training.
        config: The detector's configuration, with `ANY_CLASSES` until the data set is opened.
    """

    grid: str
    section: str
    method: str
    options: TrainOptions
    config: DetectorConfig

    def key(self) -> Row:
        """Return the fields that determine the result: equal keys are one training."""
        return {
            "grid": self.grid,
            "data": data_label(self.options.data),
            "detector": self.config.architecture,
            "seed": self.options.seed,
            "steps": self.options.steps,
            "batch_size": self.options.batch_size,
            "image_size": list(self.config.image_size),
            "channels": self.config.channels,
            "options": changed(self.options, TrainOptions(), APART),
            "config": changed(
                self.config, DetectorConfig(ANY_CLASSES, self.config.image_size), CONFIG_APART
            ),
            "recipe": self.recipe(),
        }

    def recipe(self) -> str:
        """Return a digest of every option, which changes if a default changes."""
        options = asdict(self.options.settled(self.config.architecture))
        whole = {
            "options": {k: v for k, v in options.items() if k not in (*APART, "data")},
            "config": {k: v for k, v in asdict(self.config).items() if k not in CONFIG_APART},
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]

    def place(self) -> Row:
        """Section and method of the run."""
        return {"section": self.section, "method": self.method}

    def head(self) -> Row:
        """Return the fields of its row that are known before training."""
        harmonized = self.options.cls_loss in DENSITY_LOSSES
        return {
            **self.place(),
            **self.key(),
            "bins": self.options.bins if harmonized else None,
            "strength": self.options.strength if harmonized else None,
        }

    def __str__(self) -> str:
        key = self.key()
        words = (self.section, key["data"], key["detector"], self.method)
        return f"{' · '.join(words)} · seed {self.options.seed}, {self.options.steps} steps"


SETTING = ("grid", "data", "detector", "seed", "steps", "batch_size", "image_size", "channels")
KEY = (*SETTING, "options", "config", "recipe")


def key_of(row: Row) -> str:
    """Return the key of a row or run as one string."""
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


def data_label(source: str) -> str:
    """Name a data set without the path of its folder, which differs between machines."""
    kind, colon, details = source.partition(":")
    return kind + colon + details.rstrip("/").rsplit("/", 1)[-1]


def changed(values: Any, defaults: Any, apart: tuple[str, ...]) -> Row:
    """Return the fields of a dataclass that differ from its defaults, as JSON values."""
    pairs = {f.name: (getattr(values, f.name), getattr(defaults, f.name)) for f in fields(values)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in pairs.items()
        if name not in apart and value != default
    }
