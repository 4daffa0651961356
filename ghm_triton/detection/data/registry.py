"""Opening a data set by the specification that `--data` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ghm_triton.detection.data.coco import COCODataset
from ghm_triton.detection.data.digits import DigitScenes
from ghm_triton.detection.data.problems import OnDamage, check_policy
from ghm_triton.detection.data.sample import DetectionDataset
from ghm_triton.detection.data.voc import VOCDataset

DATASETS = """\
digits              scenes of scikit-learn's handwritten digits, no download; splits train, val
                    and test. Options, as in digits:noise=0.3,images=2000
                      images=4000           training scenes
                      held_out_images=400   scenes in val and in test
                      size=128              pixels a side, or HEIGHTxWIDTH
                      noise=0               share of training boxes with a wrong label
                      imbalance=50          commonest class over rarest (held-out: at most 5)
                      seed=0                of the scenes
voc:FOLDER          Pascal VOC: Annotations/*.xml, JPEGImages/*, ImageSets/Main/SPLIT.txt
coco:FOLDER         COCO: annotations/instances_SPLIT.json or annotations/SPLIT.json, images in
                    images/, images/SPLIT/, SPLIT/ or the folder itself
"""

_FOLDERS: dict[str, type[VOCDataset] | type[COCODataset]] = {"voc": VOCDataset, "coco": COCODataset}
_KINDS = ("digits", *_FOLDERS)


def open_dataset(
    spec: str,
    split: str,
    *,
    on_damage: OnDamage = "skip",
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> DetectionDataset:
    """Open one split of a data set.

    Args:
        spec: `KIND` or `KIND:DETAILS`, where `KIND` is

            - `digits`, with optional `key=value` details separated by commas: `images`,
              `held_out_images`, `size` (`128`, or `96x128` for height x width), `noise`,
              `imbalance`, `seed`. See `DigitScenes`.
            - `voc:FOLDER`. See `VOCDataset`.
            - `coco:FOLDER`. See `COCODataset`.
        split: The split, such as `"train"`.
        on_damage: `"skip"` drops the damaged box (or the image, if that is missing or cannot be
            read) and lists it in `.problems`; `"refuse"` raises.
        class_names: The classes in label order, such as those a detector was trained with. By
            default the data set's own.
        seed: Seed of `digits`, unless the spec names one. Use the same for every split.
        **options: For `digits` its details as keyword arguments, which override the spec; for
            folders `verify_images`, whether to decode every image at opening.

    Raises:
        ValueError: The spec, the split or an option is not known or out of range.
        DamagedAnnotationError: Annotations are damaged and `on_damage` is `"refuse"`, or
            nothing usable is left.

    Example:
        >>> scenes = open_dataset("digits:noise=0.1,images=500", "train")
        >>> len(scenes), scenes.class_names[:3]
        (500, ('0', '1', '2'))
    """
    check_policy(on_damage)
    kind, _, details = spec.partition(":")
    if kind == "digits":
        return _open_digits(details, split, class_names, {"seed": seed}, options)
    if kind in _FOLDERS:
        return _open_folder(kind, details, split, class_names, on_damage, options)
    raise ValueError(f"unknown data set {kind!r} in {spec!r}; known: {', '.join(_KINDS)}")


def _open_folder(
    kind: str,
    folder: str,
    split: str,
    class_names: Sequence[str] | None,
    on_damage: OnDamage,
    options: dict[str, Any],
) -> DetectionDataset:
    if not folder:
        raise ValueError(f"{kind}: expected a folder, as in {kind}:path/to/data")
    unknown = ", ".join(options.keys() - {"verify_images"})
    if unknown:
        raise ValueError(f"{kind}: unknown option {unknown}; known: verify_images")
    opener = _FOLDERS[kind]
    return opener(folder, split, class_names=class_names, on_damage=on_damage, **options)


def _open_digits(
    details: str,
    split: str,
    class_names: Sequence[str] | None,
    defaults: dict[str, Any],
    overrides: dict[str, Any],
) -> DigitScenes:
    for key in overrides:
        _check_option(key)
    options = defaults | _parse_options(details) | overrides
    images, held_out = options.pop("images", None), options.pop("held_out_images", None)
    scenes = DigitScenes(split, images=images if split == "train" else held_out, **options)
    if class_names is not None and tuple(class_names) != scenes.class_names:
        raise ValueError(
            f"digits: the classes are {', '.join(scenes.class_names)}, not {', '.join(class_names)}"
        )
    return scenes


def _parse_size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    return int(height), int(width if cross else height)


_DIGITS_OPTIONS: dict[str, Callable[[str], Any]] = {
    "images": int,
    "held_out_images": int,
    "size": _parse_size,
    "noise": float,
    "imbalance": float,
    "seed": int,
}


def _check_option(key: str) -> None:
    if key not in _DIGITS_OPTIONS:
        raise ValueError(f"digits: unknown option {key!r}; known: {', '.join(_DIGITS_OPTIONS)}")


def _parse_options(details: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in details.split(",") if details else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"digits: expected key=value, got {part!r}")
        _check_option(key)
        if key in options:
            raise ValueError(f"digits: option {key!r} is given twice")
        try:
            options[key] = _DIGITS_OPTIONS[key](value)
        except ValueError:
            raise ValueError(f"digits: {value!r} is not a value for {key!r}") from None
    return options
