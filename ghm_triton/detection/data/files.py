"""Data sets whose images are files: the common part of Pascal VOC and COCO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from ghm_triton.detection.data.boxes import Box
from ghm_triton.detection.data.problems import (
    AnnotationProblem,
    DamagedAnnotationError,
    ProblemLog,
)
from ghm_triton.detection.data.sample import DetectionDataset, Sample, box_tensor
from ghm_triton.images.decode import check_decodes, decode, peek
from ghm_triton.images.header import DamagedImageError, ImageError
from ghm_triton.images.headers import measure

_VERIFIED = 5000  # decoding this many photographs takes seconds, all of COCO minutes


class UnusableError(Exception):
    """An image or an annotation file cannot be used; the message is the reason."""


@dataclass(frozen=True)
class ImageFile:
    """An image that was probed: its path, its size, and whether its orientation is ignored."""

    path: Path
    size: tuple[int, int]
    as_stored: bool


@dataclass
class Record:
    """One image and the boxes annotated in it."""

    image: ImageFile
    image_id: int
    source: str
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignore: list[bool] = field(default_factory=list)

    def add(self, box: Box, label: int, ignore: bool) -> None:
        """Append one box."""
        self.boxes.append(box)
        self.labels.append(label)
        self.ignore.append(ignore)


class FileDataset(DetectionDataset):
    """A data set of image files and their records.

    Raises:
        DamagedAnnotationError: There are problems and the log's policy is `"refuse"`, or no
            image is left. Later, from indexing: an image that could be opened cannot be decoded.
    """

    def __init__(
        self,
        split: str,
        class_names: tuple[str, ...],
        records: list[Record],
        log: ProblemLog,
    ) -> None:
        problems = log.settle()
        if not records:
            empty = AnnotationProblem(split, "no usable image is left in this split")
            raise DamagedAnnotationError(log.name, [empty, *problems])
        super().__init__(log.name, split, class_names, problems)
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def sources(self) -> set[str]:
        """The `source` of every sample, without decoding an image."""
        return {record.source for record in self._records}

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        try:
            image = load_image(record.image)
        except (OSError, ImageError) as error:
            message = f"cannot be decoded ({error}); verify_images=True finds all such images"
            problem = AnnotationProblem(record.source, message)
            raise DamagedAnnotationError(self.name, [problem]) from error
        return Sample(
            image=image,
            boxes=box_tensor(record.boxes),
            labels=torch.tensor(record.labels, dtype=torch.int64),
            ignore=torch.tensor(record.ignore, dtype=torch.bool),
            image_id=record.image_id,
            source=record.source,
        )


def should_verify(verify_images: bool | None, images: int) -> bool:
    """Whether to decode every image at opening; by default up to 5000 of them."""
    return images <= _VERIFIED if verify_images is None else verify_images


def probe_image(path: Path, declared: tuple[int, int] | None, *, verify: bool) -> ImageFile:
    """Validate an image without keeping it.

    The image is turned upright by its EXIF orientation, as in viewers and annotation tools, unless
    the annotation declares its size before rotation.

    Args:
        path: The file.
        declared: `(width, height)` according to the annotation, or None.
        verify: Decode the pixels too, which finds files cut short.

    Raises:
        UnusableError: It cannot be read, or has another size than declared.
    """
    try:
        if verify:
            header = measure(path.read_bytes())
            check_decodes(header)
            stored, orientation = (header.width, header.height), header.orientation
        else:
            stored, orientation = peek(path)
    except FileNotFoundError:
        raise UnusableError("the image is missing") from None
    except (OSError, ImageError) as error:
        raise UnusableError(f"the image cannot be read ({error})") from error
    upright = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    as_stored = orientation in range(2, 9) and declared == stored != upright
    size = stored if as_stored else upright
    if declared is not None and declared != size:
        expected, actual = "x".join(map(str, declared)), "x".join(map(str, size))
        raise UnusableError(f"the annotation says {expected} pixels, the image has {actual}")
    return ImageFile(path, size, as_stored)


def load_image(file: ImageFile) -> Image.Image:
    """Decode an image to RGB, upright, with the pixels that the service sees.

    Raises:
        OSError: The file cannot be read.
        ImageError: It cannot be decoded, or has another size than when it was probed.
    """
    content = file.path.read_bytes()
    header = measure(content)
    image = decode(content, header=replace(header, orientation=1) if file.as_stored else header)
    if image.size != file.size:
        raise DamagedImageError(
            "the image was {} x {} pixels and is {} x {}".format(*file.size, *image.size)
        )
    return image


def stays_inside(name: str) -> bool:
    """Whether a relative file name cannot lead out of the folder that it is resolved in."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def check_class_names(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        TypeError: They are one string.
        ValueError: There is none, or one occurs twice.
    """
    if isinstance(names, str):
        raise TypeError(f"{kind}: class_names must be a list of names, got {names!r}")
    if not names:
        raise ValueError(f"{kind}: there are no classes")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{kind}: class_names names {', '.join(twice)} more than once")
    return tuple(names)


def check_root(kind: str, root: Path) -> None:
    """Raise `ValueError` unless `root` is a folder."""
    if not root.is_dir():
        raise ValueError(f"{kind}: no folder at {str(root)!r}")
