"""A detection data set that needs no download: scenes of real handwritten digits.

The digits are the 1,797 images of 8x8 pixels that come with scikit-learn (Alpaydin and Kaynak,
*Optical Recognition of Handwritten Digits*, UCI, 1998). A scene is a deterministic function of
`(seed, split, index)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ghm_triton.detection.data.sample import DetectionDataset, Sample, box_tensor

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
IMAGES: dict[Split, int] = {"train": 4000, "val": 400, "test": 400}
HELD_OUT_IMBALANCE = 5.0

_CLASSES = 10
_SHARES: dict[Split, float] = {"train": 0.6, "val": 0.2, "test": 0.2}
_PARTITION_SEED = 1998  # not the user's seed: the same digits stay apart whatever that is
_SCENE, _LABELS = 0, 1  # random streams: noisy labels leave the pictures as they were

_HEIGHTS = (20, 44)  # of a digit's ink, in pixels, both included
_NARROWEST = 0.4  # width over height; a one can be two columns wide, which is no target at all
_INK = 0.25  # the share of full ink from which a pixel counts as written on
_DIGITS_A_SCENE = 6
_MAX_COVERED = 0.1  # of the smaller of two boxes
_MIN_SIDE = 2 * _HEIGHTS[1]

Box = tuple[int, int, int, int]
Scene = NDArray[np.float32]


class DigitScenes(DetectionDataset):
    """One to six handwritten digits on a softly textured ground, with tight boxes.

    Class frequencies are long-tailed: digit `k` is drawn with probability proportional to
    `imbalance ** (-k / 9)`, so 0 is the head, 9 the tail and `imbalance` their ratio. In the
    held-out splits the ratio is at most 5, so that 400 scenes hold about fifty boxes of the
    rarest class and its average precision means something.

    No handwritten digit occurs in two splits: the 1,797 are divided 60 : 20 : 20 within each
    class, the same way for every seed. So thresholds can be chosen on `val` and results
    reported on `test`.

    Args:
        split: `"train"`, `"val"` or `"test"`.
        images: Number of scenes; by default 4000 in train, 400 in each of the others.
        size: `(height, width)` of a scene in pixels, at least 88 each. Digits are 20 to 44
            pixels high whatever the size.
        noise: The probability in [0, 1] that a training box carries the label of another
            class, drawn uniformly. Held-out labels are always right. The pictures do not
            depend on it.
        imbalance: Frequency of the commonest class over that of the rarest, at least 1.
        seed: Of everything random but the division into splits, at least 0.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Example:
        >>> scenes = DigitScenes("val", images=8)
        >>> scenes[0].image.size
        (128, 128)
    """

    def __init__(
        self,
        split: str,
        *,
        images: int | None = None,
        size: tuple[int, int] = (128, 128),
        noise: float = 0.0,
        imbalance: float = 50.0,
        seed: int = 0,
    ) -> None:
        known = _known_split(split)
        super().__init__("digits", known, tuple(str(k) for k in range(_CLASSES)))
        self._images = IMAGES[known] if images is None else images
        _check(self._images, size, noise, imbalance, seed)
        self._size = size
        self._seed = seed
        self._noise = noise if known == "train" else 0.0
        ratio = imbalance if known == "train" else min(imbalance, HELD_OUT_IMBALANCE)
        self.class_probabilities = _long_tail(ratio)
        self._glyphs = _glyphs(known)

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        index %= len(self)
        rng = self._rng(index, _SCENE)
        scene = _background(rng, *self._size)
        labels, boxes = self._write(scene, rng)
        if self._noise:
            labels = _flip(labels, self._noise, self._rng(index, _LABELS))
        return Sample(
            image=Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8)),
            boxes=box_tensor([(float(a), float(b), float(c), float(d)) for a, b, c, d in boxes]),
            labels=torch.tensor(labels, dtype=torch.int64),
            ignore=torch.zeros(len(labels), dtype=torch.bool),
            image_id=index,
            source=self._source(index),
        )

    def sources(self) -> set[str]:
        """The `source` of every sample, without composing a scene."""
        return {self._source(index) for index in range(len(self))}

    def _source(self, index: int) -> str:
        return f"digits/{self.split}/{index:06d}"

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        key = (self._seed, SPLITS.index(_known_split(self.split)), index, stream)
        return np.random.default_rng(key)

    def _write(self, scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[Box]]:
        """Writes digits into `scene`; one that finds no room is left out."""
        labels: list[int] = []
        boxes: list[Box] = []
        count = int(rng.integers(1, _DIGITS_A_SCENE + 1))
        for label in rng.choice(_CLASSES, size=count, p=self.class_probabilities):
            glyphs = self._glyphs[label]
            ink = _render(glyphs[rng.integers(len(glyphs))], rng)
            box = _find_room(ink.shape, scene.shape, boxes, rng)
            if box is not None:
                _blend(scene, ink, box, rng)
                labels.append(int(label))
                boxes.append(box)
        return labels, boxes


def _known_split(split: str) -> Split:
    for known in SPLITS:
        if split == known:
            return known
    raise ValueError(f"digits: unknown split {split!r}; available: {', '.join(SPLITS)}")


def _check(images: int, size: tuple[int, int], noise: float, imbalance: float, seed: int) -> None:
    if images < 1:
        raise ValueError(f"digits: images must be at least 1, got {images}")
    if min(size) < _MIN_SIDE:
        raise ValueError(f"digits: size must be at least {_MIN_SIDE} pixels a side, got {size}")
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"digits: noise must be in [0, 1], got {noise}")
    if not (imbalance >= 1.0 and math.isfinite(imbalance)):
        raise ValueError(f"digits: imbalance must be a finite number >= 1, got {imbalance}")
    if seed < 0:
        raise ValueError(f"digits: seed must be at least 0, got {seed}")


def _long_tail(ratio: float) -> NDArray[np.float64]:
    weights = ratio ** (-np.arange(_CLASSES) / (_CLASSES - 1))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


@lru_cache(maxsize=1)
def _source() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # takes a second, so only when digits are wanted

    digits = load_digits()
    return digits.images / 16.0, digits.target.astype(np.int64)


def source_indices(split: str) -> list[NDArray[np.int64]]:
    """Which of scikit-learn's digits a split uses.

    Args:
        split: `"train"`, `"val"` or `"test"`.

    Returns:
        For each class, int64 indices into `sklearn.datasets.load_digits().images`.
    """
    known = _known_split(split)
    target = _source()[1]
    rng = np.random.default_rng(_PARTITION_SEED)
    parts = []
    for label in range(_CLASSES):
        members = rng.permutation(np.flatnonzero(target == label))
        ends = np.cumsum([round(_SHARES[name] * len(members)) for name in SPLITS[:-1]])
        parts.append(np.split(members, ends)[SPLITS.index(known)])
    return parts


@lru_cache(maxsize=len(SPLITS))
def _glyphs(split: Split) -> list[list[Image.Image]]:
    """For each class the split's digits, enlarged smoothly and cut to their ink."""
    images = _source()[0]
    return [[_enlarge(images[i]) for i in part] for part in source_indices(split)]


def _enlarge(digit: NDArray[np.float64]) -> Image.Image:
    padded = np.pad(digit, 1)  # so that strokes that touch the rim round off instead of breaking
    small = Image.fromarray((padded * 255).astype(np.uint8))
    large = small.resize((80, 80), Image.Resampling.BICUBIC)
    written = np.asarray(large) >= _INK * 255
    rows, columns = np.flatnonzero(written.any(1)), np.flatnonzero(written.any(0))
    return large.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _render(glyph: Image.Image, rng: np.random.Generator) -> Scene:
    """Ink in [0, 1], `[h, w]`; its first and last rows and columns are written on."""
    height = int(rng.integers(_HEIGHTS[0], _HEIGHTS[1] + 1))
    aspect = glyph.width / glyph.height * math.exp(rng.uniform(-0.2, 0.2))
    width = round(height * min(max(aspect, _NARROWEST), 1.0))
    ink = glyph.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(ink, dtype=np.float32) / 255.0


def _background(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A greyish ground, float32 `[height, width, 3]`: broad patches and a little grain."""
    level = rng.uniform(70, 185)
    patches = rng.uniform(-18, 18, (5, 5)).astype(np.float32)
    texture = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.standard_normal((height, width), dtype=np.float32) * np.float32(5.0)
    grey = np.asarray(texture) + grain + np.float32(level)
    tint = rng.uniform(-10, 10, 3).astype(np.float32)
    return np.asarray(grey[..., None] + tint, dtype=np.float32)


def _find_room(
    ink: Sequence[int], scene: Sequence[int], boxes: list[Box], rng: np.random.Generator
) -> Box | None:
    height, width = ink
    for _ in range(20):
        x = int(rng.integers(scene[1] - width + 1))
        y = int(rng.integers(scene[0] - height + 1))
        box = (x, y, x + width, y + height)
        if all(_covered(box, other) <= _MAX_COVERED for other in boxes):
            return box
    return None


def _covered(a: Box, b: Box) -> float:
    """The intersection as a share of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0) * max(height, 0) / smaller


def _blend(scene: Scene, ink: Scene, box: Box, rng: np.random.Generator) -> None:
    """Writes `ink` in a colour that stands out from what is under it, lighter or darker."""
    x1, y1, x2, y2 = box
    patch = scene[y1:y2, x1:x2]
    ground = float(patch.mean())
    contrast = rng.uniform(60, 120)
    lighter = ground + contrast <= 255 and (ground - contrast < 0 or bool(rng.random() < 0.5))
    tint = rng.uniform(-25, 25, 3)
    colour = (ground + (contrast if lighter else -contrast) + tint).astype(np.float32)
    patch += ink[..., None] * (colour - patch)


def _flip(labels: list[int], noise: float, rng: np.random.Generator) -> list[int]:
    """Each label, with probability `noise`, becomes one of the other classes."""
    wrong = rng.random(len(labels)) < noise
    shift = np.where(wrong, rng.integers(1, _CLASSES, len(labels)), 0)
    return [int(label) for label in (np.array(labels) + shift) % _CLASSES]
