"""COCO JSON: one file with the images, categories and boxes of a split."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ghm_triton.detection.data.boxes import clean_box
from ghm_triton.detection.data.files import (
    FileDataset,
    Record,
    UnusableError,
    check_class_names,
    check_root,
    probe_image,
    should_verify,
    stays_inside,
)
from ghm_triton.detection.data.problems import DamagedAnnotationError, OnDamage, ProblemLog

_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


class COCODataset(FileDataset):
    """A folder with `annotations/instances_{split}.json` or `annotations/{split}.json`.

    The year may be left out of `split` where that is unambiguous: `train` finds
    `instances_train2017.json`. Images are looked for by `file_name` in `images/`,
    `images/{split}/`, `{split}/` and the folder itself, in that order.

    A box `x, y, width, height` becomes `x, y, x + width, y + height`. Labels count the
    categories in the order of their ids. Regions marked `iscrowd` are kept with `ignore` set.

    Args:
        root: The folder.
        split: Which annotation file.
        class_names: In label order; by default the file's own categories. Annotations of a
            category that is not among them are a problem.
        on_damage: `"skip"` or `"refuse"`, see `open_dataset`.
        verify_images: Decode every image at opening to find those cut short; by default up to
            5000 images.

    Raises:
        ValueError: The folder, or the split in it, does not exist.
        DamagedAnnotationError: See `open_dataset`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        on_damage: OnDamage = "skip",
        verify_images: bool | None = None,
    ) -> None:
        root = Path(root).expanduser()
        check_root("coco", root)
        split, path = _find_annotations(root, split)
        log = ProblemLog(f"coco:{root.resolve().name}", on_damage)
        reader = _Reader(path, root, split, log)
        available = class_names if class_names is not None else reader.class_names
        names = check_class_names(log.name, available)
        records = reader.read(names, verify_images)
        super().__init__(split, names, records, log)


class _Reader:
    def __init__(self, path: Path, root: Path, split: str, log: ProblemLog) -> None:
        self._source = f"annotations/{path.name}"
        self._folders = [root / "images", root / "images" / split, root / split, root]
        self._log = log
        self._content = self._load(path)
        self._categories = self._read_categories()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Category names in the order of their ids."""
        return tuple(self._categories[key] for key in sorted(self._categories))

    def read(self, class_names: tuple[str, ...], verify_images: bool | None) -> list[Record]:
        """The usable images with their usable boxes."""
        verify = should_verify(verify_images, len(self._content["images"]))
        records, dropped = self._read_images(verify)
        by_name = {name: label for label, name in enumerate(class_names)}
        labels = {key: by_name[name] for key, name in self._categories.items() if name in by_name}
        for entry in self._content["annotations"]:
            if not isinstance(entry, dict):
                self._log.report(self._source, f"annotation {entry!r:.50} is not an object")
                continue
            image_id = entry.get("image_id")
            if _is_id(image_id) and image_id in records:
                self._add(records[image_id], entry, labels)
            elif not (_is_id(image_id) and image_id in dropped):
                message = f"annotation {entry.get('id')}: no image has id {image_id!r}; box dropped"
                self._log.report(self._source, message)
        return list(records.values())

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self._hopeless(f"cannot be read as JSON ({error})") from error
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise self._hopeless(f"has no list {key!r}")
        return dict(content)

    def _read_categories(self) -> dict[int, str]:
        categories: dict[int, str] = {}
        for entry in self._content["categories"]:
            key, name = _get(entry, "id"), _get(entry, "name")
            if not _is_id(key) or not isinstance(name, str) or not name:
                raise self._hopeless(f"category {entry!r:.80} needs an integer id and a name")
            if key in categories or name in categories.values():
                raise self._hopeless(f"category {key} ({name!r}) occurs twice")
            categories[key] = name
        return categories

    def _hopeless(self, message: str) -> DamagedAnnotationError:
        """An error for damage to the whole file."""
        self._log.report(self._source, message)
        return DamagedAnnotationError(self._log.name, self._log.problems)

    def _read_images(self, verify: bool) -> tuple[dict[int, Record], set[int]]:
        records: dict[int, Record] = {}
        dropped: set[int] = set()
        for entry in self._content["images"]:
            key, name = _get(entry, "id"), _get(entry, "file_name")
            if not _is_id(key) or not isinstance(name, str):
                message = f"image {entry!r:.80} needs an integer id and a file_name; image dropped"
                self._log.report(self._source, message)
            elif key in records or key in dropped:
                self._log.report(name, f"another image has id {key} too; image dropped")
            else:
                try:
                    image = probe_image(self._find(name), _declared_size(entry), verify=verify)
                    records[key] = Record(image, key, name)
                except UnusableError as error:
                    dropped.add(key)
                    self._log.report(name, f"{error}; image dropped")
        return records, dropped

    def _find(self, name: str) -> Path:
        if not stays_inside(name):
            raise UnusableError("the name leads out of the folder")
        for folder in self._folders:
            if (folder / name).is_file():
                return folder / name
        raise UnusableError("the image is missing")

    def _describe(self, category: Any) -> str:
        known = _is_id(category) and category in self._categories
        return repr(self._categories[category]) if known else f"with category_id {category!r}"

    def _add(self, record: Record, entry: dict[str, Any], labels: dict[int, int]) -> None:
        where = f"annotation {entry.get('id')}"
        category, box = entry.get("category_id"), entry.get("bbox")
        if not _is_id(category) or category not in labels:
            name = self._describe(category)
            self._log.report(record.source, f"{where}: unknown class {name}; box dropped")
            return
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            message = f"{where}: bbox {box!r:.50} is not four numbers; box dropped"
            self._log.report(record.source, message)
            return
        x, y, width, height = map(float, box)
        clean, problem = clean_box((x, y, x + width, y + height), *record.image.size)
        if problem is not None:
            self._log.report(record.source, f"{where}: {problem}")
        if clean is not None:
            record.add(clean, labels[category], bool(entry.get("iscrowd", 0)))


def _get(entry: object, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (_is_id(value) and abs(value) < 2**53)


def _declared_size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


def _find_annotations(root: Path, split: str) -> tuple[str, Path]:
    """The split with its year, and its file."""
    folder = root / "annotations"
    if not folder.is_dir():
        raise ValueError(f"coco: {str(folder)!r} is missing")
    splits: dict[str, Path] = {}
    files = sorted(folder.glob("*.json"), key=lambda path: path.name.startswith("instances_"))
    for path in files:  # those named instances_ come last and win
        if not path.name.startswith(_OTHER_TASKS):
            splits[path.stem.removeprefix("instances_")] = path
    dated = [name for name in splits if re.fullmatch(re.escape(split) + r"\d{4}", name)]
    if split not in splits and len(dated) == 1:
        split = dated[0]
    if split not in splits:
        available = ", ".join(sorted(splits)) or "none"
        raise ValueError(f"coco: unknown split {split!r}; available: {available}")
    return split, splits[split]
