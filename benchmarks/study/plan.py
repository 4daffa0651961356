"""What one run of the study is, and what tells it from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks.result_file import Row
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.config import TrainOptions

# A configuration needs classes, and a data set's are known only once it is opened.
ANY_CLASSES = ("object",)
# Have fields of their own in a row, or do not change what is learnt.
APART = ("data", "seed", "steps", "batch_size", "workers", "checkpoint_every")
CONFIG_APART = ("class_names", "architecture", "image_size", "channels")
DENSITY_LOSSES = ("ghm", "ghm-softmax")


@dataclass(frozen=True)
class Run:
    """One training, in its place in a grid.

    Attributes:
        grid: The grid's name.
        section: The section's.
        method: The method's.
        options: How to train.
        config: What; of `ANY_CLASSES` until the data set is opened.
    """

    grid: str
    section: str
    method: str
    options: TrainOptions
    config: DetectorConfig

    def key(self) -> Row:
        """What decides the outcome: runs of one grid with equal keys are one training."""
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
        """A digest of every option and setting: it tells runs apart when a default has changed."""
        options = asdict(self.options.settled(self.config.architecture))
        whole = {
            "options": {k: v for k, v in options.items() if k not in (*APART, "data")},
            "config": {k: v for k, v in asdict(self.config).items() if k not in CONFIG_APART},
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]

    def place(self) -> Row:
        """Where in the grid the run stands."""
        return {"section": self.section, "method": self.method}

    def head(self) -> Row:
        """The fields of its row that are known before it is trained."""
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
    """A row's or a run's key as one string."""
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


def data_label(source: str) -> str:
    """A data set without its folder's path, which differs between machines."""
    kind, colon, details = source.partition(":")
    return kind + colon + details.rstrip("/").rsplit("/", 1)[-1]


def changed(values: Any, defaults: Any, apart: tuple[str, ...]) -> Row:
    """The fields of a dataclass that differ from its defaults, as JSON has them."""
    pairs = {f.name: (getattr(values, f.name), getattr(defaults, f.name)) for f in fields(values)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in pairs.items()
        if name not in apart and value != default
    }
