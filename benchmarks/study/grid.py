"""Read the runs of a YAML grid; every mistake is found before anything trains.

```yaml
data:                               # name: source, network input, and options of training
  cells: {source: "voc:${BCCD_ROOT}", image_size: [256, 320], channels: 64, batch_size: 8}
methods:                            # name: options of training other than the defaults
  focal: {cls_loss: focal, reg_loss: sl1, fcos: {reg_loss: giou}}  # for fcos, other ones
  clean: {config: {assigner: cleanliness}}                         # the detector's configuration
sections:
  methods:
    data: [cells]
    detectors: [retinanet, fcos]
    methods: [focal]                # or by detector: {retinanet: [focal, clean], fcos: [focal]}
    seeds: [0, 1, 2]
    steps: 500                      # or by data set: {cells: 500}
```
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from benchmarks.study.plan import ANY_CLASSES, Run, data_label, key_of
from ghm_triton.detection.models.config import ARCHITECTURES, DetectorConfig
from ghm_triton.detection.training.build import build_losses
from ghm_triton.detection.training.config import TrainOptions

Mapping = dict[str, Any]
OPTIONS, CONFIG = get_type_hints(TrainOptions), get_type_hints(DetectorConfig)
GIVEN_ELSEWHERE = {"data", "seed", "steps"}
OF_DATA = GIVEN_ELSEWHERE | {"train_split", "val_split", "on_damage"}
SIZE = ("image_size", "channels")
METHOD_OPTIONS = [name for name in OPTIONS if name not in OF_DATA]
DATA_OPTIONS = [name for name in OPTIONS if name not in GIVEN_ELSEWHERE]
CONFIG_FIELDS = [n for n in CONFIG if n not in ("class_names", "architecture", *SIZE)]
SECTION = ("data", "detectors", "methods", "seeds", "steps")
VARIABLE = re.compile(r"\$\{(\w+)\}")


class GridError(ValueError):
    """The grid is invalid; the message names the value and its place."""


@dataclass(frozen=True)
class Settings:
    """Options of training and of the detector's configuration."""

    options: Mapping
    config: Mapping

    def over(self, other: Settings) -> Settings:
        """Merge with others, which these take precedence over."""
        return Settings({**other.options, **self.options}, {**other.config, **self.config})


class Grid:
    """A validated grid.

    Args:
        path: The YAML file; its name without suffix is the grid's.

    Raises:
        GridError: The file is not a grid; the message names the value and its place.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        top = dict(self._mapping(_read(path), "", ("data", "methods", "sections")))
        if isinstance(top.get("methods"), str):  # a file next to this one, shared by grids
            top["methods"] = _read(path.parent / top["methods"])
        for name in ("data", "methods", "sections"):
            self._mapping(top.get(name), name)
        self._data = {n: self._read_data(n, v) for n, v in top["data"].items()}
        self._methods = {n: self._read_method(n, v) for n, v in top["methods"].items()}
        self._sections: dict[str, Mapping] = top["sections"]
        for name in self._sections:
            self._check_section(name)

    def sections(self) -> list[str]:
        """Names of the sections, in the file's order."""
        return list(self._sections)

    def runs(self, only: Iterable[str] | None = None) -> list[Run]:
        """List the runs of the sections, in the file's order, seed by seed.

        Args:
            only: Names of sections; None for all.

        Raises:
            GridError: A section is unknown, an environment variable is not set, or a method is
                incompatible with a detector.
        """
        chosen = list(self._sections) if only is None else list(only)
        for name in chosen:
            self._known(name, self._sections, "sections", "section")
        found = [run for name in self._sections if name in chosen for run in self._expand(name)]
        self._refuse_confusion(found)
        return found

    def _expand(self, section: str) -> list[Run]:
        content, runs = self._sections[section], []
        for seed in content["seeds"]:
            for data in content["data"]:
                for detector, method in self._pairs(section):
                    runs.append(self._run(section, data, detector, method, seed))
        return runs

    def _run(self, section: str, data: str, detector: str, method: str, seed: int) -> Run:
        content = self._sections[section]
        steps = content["steps"]
        settings = self._methods[method][detector].over(self._data[data])
        options = {**settings.options, "seed": seed}
        options["steps"] = steps[data] if isinstance(steps, dict) else steps
        options["data"] = self._expanded(settings.options["data"], f"data.{data}.source")
        where = f"sections.{section}: method {method!r} with detector {detector!r}, data {data!r}"
        try:
            config = DetectorConfig(ANY_CLASSES, architecture=detector, **settings.config)
            training = TrainOptions(**options)
            # Refuses incompatible options, such as a loss that the detector cannot train with.
            build_losses(
                training,
                architecture=detector,
                classifier=config.classifier,
                assigner=config.assigner,
            )
        except ValueError as error:
            raise self._error(where, str(error)) from error
        return Run(self.name, section, method, training, config)

    def _pairs(self, section: str) -> list[tuple[str, str]]:
        methods = self._sections[section]["methods"]
        if isinstance(methods, dict):
            return [(detector, name) for detector, names in methods.items() for name in names]
        detectors = self._sections[section]["detectors"]
        return [(detector, name) for detector in detectors for name in methods]

    def _read_data(self, name: str, content: Any) -> Settings:
        where = f"data.{name}"
        given = self._mapping(content, where, ("source", *SIZE, "config", *DATA_OPTIONS))
        for needed in ("source", *SIZE, "batch_size"):
            if needed not in given:
                raise self._error(where, f"{needed} is missing")
        if not isinstance(given["source"], str):
            raise self._error(f"{where}.source", f"expected a string, got {given['source']!r}")
        settings = self._settings(given, where, ("source", *SIZE))
        size = {key: self._value(CONFIG[key], given[key], f"{where}.{key}") for key in SIZE}
        return Settings({**settings.options, "data": given["source"]}, {**size, **settings.config})

    def _read_method(self, name: str, content: Any) -> dict[str, Settings]:
        where = f"methods.{name}"
        allowed = ("config", *ARCHITECTURES, *METHOD_OPTIONS)
        given = self._mapping({} if content is None else content, where, allowed)
        usual = self._settings(given, where, ARCHITECTURES)
        settings = {}
        for detector in ARCHITECTURES:
            inner = f"{where}.{detector}"
            own = self._mapping(given.get(detector, {}), inner, ("config", *METHOD_OPTIONS))
            settings[detector] = self._settings(own, inner).over(usual)
        return settings

    def _settings(self, given: Mapping, where: str, apart: Iterable[str] = ()) -> Settings:
        config = self._mapping(given.get("config", {}), f"{where}.config", CONFIG_FIELDS)
        options = {k: v for k, v in given.items() if k not in (*apart, "config")}
        return Settings(
            {k: self._value(OPTIONS[k], v, f"{where}.{k}") for k, v in options.items()},
            {k: self._value(CONFIG[k], v, f"{where}.config.{k}") for k, v in config.items()},
        )

    def _check_section(self, name: str) -> None:
        where = f"sections.{name}"
        content = self._mapping(self._sections[name], where, SECTION)
        by_detector = isinstance(content.get("methods"), dict)
        for needed in SECTION:
            if needed not in content and not (needed == "detectors" and by_detector):
                raise self._error(where, f"{needed} is missing")
        if by_detector and "detectors" in content:
            raise self._error(where, "methods by detector already say which; drop detectors")
        self._names(content["data"], self._data, f"{where}.data", "data set")
        groups = content["methods"] if by_detector else {"": content["methods"]}
        self._names(
            list(groups) if by_detector else content["detectors"],
            ARCHITECTURES,
            f"{where}.methods" if by_detector else f"{where}.detectors",
            "detector",
        )
        for detector, names in groups.items():
            inner = f"{where}.methods.{detector}".rstrip(".")
            self._names(names, self._methods, inner, "method")
        self._list(content["seeds"], f"{where}.seeds", self._whole)
        self._check_steps(content["steps"], content["data"], f"{where}.steps")

    def _check_steps(self, steps: Any, data: list[str], where: str) -> None:
        if not isinstance(steps, dict):
            self._whole(steps, where)
            return
        self._names(list(steps), data, where, "data set of this section")
        for name in data:
            if name not in steps:
                raise self._error(where, f"none for data set {name!r}")
            self._whole(steps[name], f"{where}.{name}")

    def _names(self, given: Any, known: Iterable[str], where: str, what: str) -> None:
        self._list(given, where, lambda name, place: self._known(name, known, place, what))

    def _list(self, given: Any, where: str, check: Callable[[Any, str], None]) -> None:
        if not isinstance(given, list) or not given:
            raise self._error(where, f"expected a list, got {given!r}")
        for value in given:
            check(value, where)
            if given.count(value) > 1:
                raise self._error(where, f"{value!r} is there twice")

    def _known(self, name: Any, known: Iterable[str], where: str, what: str) -> None:
        if name not in list(known):
            raise self._error(where, f"unknown {what} {name!r}; known: {', '.join(known)}")

    def _whole(self, value: Any, where: str) -> None:
        if type(value) is not int or value < 0:
            raise self._error(where, f"expected a whole number, got {value!r}")

    def _mapping(self, value: Any, where: str, allowed: Iterable[str] | None = None) -> Mapping:
        if not isinstance(value, dict):
            raise self._error(where, f"expected a mapping, got {value!r}")
        for key in value:
            if allowed is None and not isinstance(key, str):
                raise self._error(where, f"{key!r} is not a name; put it in quotes")
            if allowed is not None:
                self._known(key, allowed, where, "key")
        return value

    def _value(self, kind: Any, value: Any, where: str) -> Any:
        """Validate a value against the field's type; integers are numbers, lists are tuples."""
        if isinstance(value, list):
            value = tuple(value)
        try:
            return TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            wanted = getattr(kind, "__name__", kind) if isinstance(kind, type) else kind
            raise self._error(where, f"expected {wanted}, got {value!r}") from None

    def _expanded(self, text: str, where: str) -> str:
        def value_of(match: re.Match[str]) -> str:
            value = os.environ.get(match[1], "")
            if not value:
                raise self._error(where, f"the environment variable {match[1]} is not set")
            return value

        return VARIABLE.sub(value_of, text)

    def _refuse_confusion(self, runs: list[Run]) -> None:
        """Refuse two folders of one name, which rows could not tell apart."""
        sources: dict[str, str] = {}
        for run in runs:
            label, source = data_label(run.options.data), run.options.data
            if sources.setdefault(label, source) != source:
                raise self._error("data", f"{sources[label]!r} and {source!r} are both {label!r}")

    def _error(self, where: str, reason: str) -> GridError:
        return GridError(f"{self.path}: {where}: {reason}" if where else f"{self.path}: {reason}")


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(), Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise GridError(f"{path}: {error}") from error


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A safe loader that refuses duplicate keys, of which PyYAML's keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Construct a mapping; refuse duplicate keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


MERGE = "tag:yaml.org,2002:merge"


def distinct(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by training: key to the runs that share it."""
    trainings: dict[str, list[Run]] = {}
    for run in runs:
        trainings.setdefault(key_of(run.key()), []).append(run)
    return trainings
