"""Pascal VOC folders: one XML file an image, splits in `ImageSets/Main`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ghm_triton.detection.data.boxes import Box, clean_box
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
from ghm_triton.detection.data.problems import OnDamage, ProblemLog

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_PER_CLASS = ("_train", "_val", "_trainval", "_test")  # lists of VOC's classification task


class VOCDataset(FileDataset):
    """A folder with `Annotations/*.xml`, `JPEGImages/*` and `ImageSets/Main/{split}.txt`.

    Coordinates in the files are the first and the last pixel of an object, counted from 1. The
    box here is `xmin - 1, ymin - 1, xmax, ymax`, which covers just those pixels, so a box over
    the whole image is `0, 0, width, height`. A box whose corners are equal is taken for an
    annotation error, not for an object one pixel wide, and is reported.

    Objects marked `difficult` are kept with `ignore` set.

    Args:
        root: The folder.
        split: The name of a list in `ImageSets/Main`.
        class_names: In label order. By default the sorted names in the annotations of the
            `trainval` list, else of `train`, else of the whole folder, so that they are the same
            for every split. Objects of another class are a problem.
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
        check_root("voc", root)
        stems = _read_list(root, split)
        log = ProblemLog(f"voc:{root.resolve().name}", on_damage)
        reader = _Reader(root, log, should_verify(verify_images, len(stems)))
        available = class_names if class_names is not None else reader.find_classes()
        names = check_class_names(log.name, available)
        records = list(reader.read(stems, names))
        super().__init__(split, names, records, log)


@dataclass(frozen=True)
class _Annotation:
    size: tuple[int, int] | None
    objects: list[Element]


class _Reader:
    def __init__(self, root: Path, log: ProblemLog, verify: bool) -> None:
        self._root = root
        self._log = log
        self._verify = verify
        self._images = _list_images(root)

    def find_classes(self) -> tuple[str, ...]:
        """The sorted class names of the training annotations."""
        names: set[str] = set()
        for stem in _training_stems(self._root):
            try:
                annotation = self._annotation(stem)
            except UnusableError:
                continue  # reported when the split that it belongs to is read
            names.update(_text(element, "name") for element in annotation.objects)
        return tuple(sorted(names - {""}))

    def read(self, stems: list[str], class_names: tuple[str, ...]) -> Iterator[Record]:
        """The usable images of a split. Positions in its list are their ids."""
        labels = {name: label for label, name in enumerate(class_names)}
        seen: set[str] = set()
        for position, stem in enumerate(stems):
            source = f"Annotations/{stem}.xml"
            if stem in seen:
                self._log.report(source, "listed twice in the split; second entry dropped")
                continue
            seen.add(stem)
            try:
                annotation = self._annotation(stem)
                record = self._record(stem, position, annotation)
            except UnusableError as error:
                self._log.report(source, f"{error}; image dropped")
                continue
            for element in annotation.objects:
                self._add(record, element, labels)
            yield record

    def _annotation(self, stem: str) -> _Annotation:
        if not stays_inside(stem):
            raise UnusableError("the name leads out of the folder")
        try:
            data = (self._root / "Annotations" / f"{stem}.xml").read_bytes()
        except OSError as error:
            raise UnusableError(f"cannot be read ({error.strerror})") from error
        root = parse_xml(data)
        return _Annotation(_declared_size(root), root.findall("object"))

    def _record(self, stem: str, position: int, annotation: _Annotation) -> Record:
        name = self._images.get(stem)
        if name is None:
            raise UnusableError(f"the image JPEGImages/{stem}.jpg is missing")
        path = self._root / "JPEGImages" / name
        image = probe_image(path, annotation.size, verify=self._verify)
        return Record(image, position, f"JPEGImages/{name}")

    def _add(self, record: Record, element: Element, labels: dict[str, int]) -> None:
        source = f"Annotations/{Path(record.source).stem}.xml"
        name = _text(element, "name")
        if name not in labels:
            what = f"unknown class {name!r}" if name else "object without a name"
            self._log.report(source, f"{what}; box dropped")
            return
        try:
            corners = _corners(element)
        except UnusableError as error:
            self._log.report(source, f"{error}; box dropped")
            return
        box, problem = clean_box(corners, *record.image.size, one_based=True)
        if problem is not None:
            self._log.report(source, f"{name}: {problem}")
        if box is not None:
            record.add(box, labels[name], _text(element, "difficult") == "1")


def parse_xml(data: bytes) -> Element:
    """Parse XML, refusing document type declarations and so all entity attacks.

    Raises:
        UnusableError: It does not parse, or declares a document type.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the latter: odd encodings
        raise UnusableError(f"is not well-formed XML ({error})") from error
    return builder.close()


def _refuse_doctype(*_: object) -> None:
    raise UnusableError("declares a document type (DTD), which annotations have no use for")


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _corners(element: Element) -> Box:
    box = element.find("bndbox")
    if box is None:
        raise UnusableError("object without a bndbox")
    values = []
    for corner in _CORNERS:
        text = _text(box, corner)
        try:
            values.append(float(text))
        except ValueError:
            what = f"{corner} is {text!r}, not a number" if text else f"bndbox without {corner}"
            raise UnusableError(what) from None
    return values[0], values[1], values[2], values[3]


def _declared_size(root: Element) -> tuple[int, int] | None:
    """The declared size, or None: some tools leave the field out or write zeros."""
    try:
        size = int(_text(root, "size/width")), int(_text(root, "size/height"))
    except ValueError:
        return None
    return size if min(size) > 0 else None


def _list_images(root: Path) -> dict[str, str]:
    """File names in `JPEGImages` by stem; of several, the first in the order of `_SUFFIXES`."""
    folder = root / "JPEGImages"
    found = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES]
    found.sort(key=lambda path: (_SUFFIXES.index(path.suffix.lower()), path.name), reverse=True)
    return {path.stem: path.name for path in found}


def _read_list(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "Main"
    for needed in (folder, root / "Annotations", root / "JPEGImages"):
        if not needed.is_dir():
            raise ValueError(f"voc: {str(needed)!r} is missing")
    available = sorted(path.stem for path in folder.glob("*.txt"))
    if split not in available:
        shown = [name for name in available if not name.endswith(_PER_CLASS)]
        raise ValueError(f"voc: unknown split {split!r}; available: {', '.join(shown) or 'none'}")
    lines = (folder / f"{split}.txt").read_text("utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _training_stems(root: Path) -> list[str]:
    for split in ("trainval", "train"):
        if (root / "ImageSets" / "Main" / f"{split}.txt").is_file():
            return _read_list(root, split)
    return sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
