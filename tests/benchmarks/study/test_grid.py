"""Every mistake in a grid is reported with its place before anything trains."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.grid import Grid, GridError, distinct
from benchmarks.study.plan import data_label, key_of
from ghm_triton.detection.training.config import GHM_R_WEIGHT

GRIDS = Path(__file__).parents[3] / "benchmarks" / "study" / "grids"
SMALL = """
data:
  clean: {source: digits, image_size: [96, 128], channels: 16, batch_size: 4, hflip: 0.5}
  cells: {source: "voc:${CELLS}", image_size: [64, 64], channels: 8, batch_size: 2,
          train_split: trainval, lr: 0.002, config: {head_convs: 1}}
methods:
  ghm: {fcos: {reg_loss: giou}}
  same: {strength: 0.25, reg_strength: 0.25}
  focal: {cls_loss: focal, reg_loss: sl1, lr: 1, fcos: {reg_loss: iou, lr: 0.5}}
  clean-anchors: {config: {assigner: cleanliness}}
sections:
  first:
    data: [clean, cells]
    detectors: [retinanet, fcos]
    methods: [ghm, focal]
    seeds: [3, 4]
    steps: {clean: 10, cells: 20}
  second:
    data: [clean]
    methods: {retinanet: [same, clean-anchors], faster-rcnn: [clean-anchors]}
    seeds: [3]
    steps: 10
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Make the small grid with a change."""
    monkeypatch.setenv("CELLS", "/somewhere/cells/")

    def make(old="", new=""):
        assert old in SMALL
        path = tmp_path / "small.yaml"
        path.write_text(SMALL.replace(old, new, 1) if old else SMALL)
        return Grid(path)

    return make


def test_every_combination_in_order_seed_by_seed(grid):
    runs = grid().runs(["first"])
    heads = [run.head() for run in runs]
    assert [head["seed"] for head in heads] == [3] * 8 + [4] * 8
    assert [head["data"] for head in heads[:8]] == ["digits"] * 4 + ["voc:cells"] * 4
    assert [(head["detector"], head["method"]) for head in heads[:4]] == [
        ("retinanet", "ghm"),
        ("retinanet", "focal"),
        ("fcos", "ghm"),
        ("fcos", "focal"),
    ]
    assert [head["steps"] for head in heads[:8]] == [10] * 4 + [20] * 4


def test_what_a_row_says_of_a_run(grid):
    run = next(run for run in grid().runs() if run.method == "focal")
    assert run.head() == {
        "grid": "small",
        "section": "first",
        "data": "digits",
        "detector": "retinanet",
        "method": "focal",
        "seed": 3,
        "steps": 10,
        "batch_size": 4,
        "image_size": [96, 128],
        "channels": 16,
        "options": {"cls_loss": "focal", "reg_loss": "sl1", "lr": 1.0, "hflip": 0.5},
        "config": {},
        "recipe": run.recipe(),
        "bins": None,
        "strength": None,
    }
    assert isinstance(run.options.lr, float)
    assert run.options.data == "digits"
    assert run.config.image_size == (96, 128)


def test_the_recipe_tells_what_was_trained_whatever_the_defaults_are(grid, monkeypatch):
    run = next(run for run in grid().runs() if run.method == "ghm")
    recipe = run.recipe()
    said = replace(run.options, guided_loss=True, reg_weight=10.0)  # as it is by default
    assert replace(run, options=said).recipe() == recipe
    for other in ({"guided_loss": False}, {"strength": 0.5}, {"seed": 7, "lr": 0.1}):
        assert replace(run, options=replace(run.options, **other)).recipe() != recipe
    deeper = replace(run.config, head_convs=3)
    assert replace(run, config=deeper).recipe() != recipe
    # The same words with another default are another training.
    monkeypatch.setitem(GHM_R_WEIGHT, "retinanet", 5.0)
    assert run.recipe() != recipe
    assert run.key()["options"] == {"hflip": 0.5}


def test_a_method_is_above_the_data_set_and_a_detector_above_the_method(grid):
    options = {
        (run.options.data, run.config.architecture, run.method): run.options
        for run in grid().runs(["first"])
    }
    cells = "voc:/somewhere/cells/"
    assert options[cells, "retinanet", "ghm"].lr == 0.002
    assert options[cells, "retinanet", "focal"].lr == 1.0
    assert options[cells, "fcos", "focal"].lr == 0.5
    assert options[cells, "fcos", "focal"].reg_loss == "iou"
    assert options[cells, "fcos", "focal"].cls_loss == "focal"
    assert options[cells, "retinanet", "ghm"].train_split == "trainval"


def test_a_training_that_two_places_want_is_one(grid):
    runs = grid().runs()
    trainings = distinct(runs)
    assert sum(map(len, trainings.values())) == len(runs) == 19
    # A method that spells out the default is the default.
    (shared,) = [places for places in trainings.values() if len(places) > 1]
    assert [(run.section, run.method) for run in shared] == [("first", "ghm"), ("second", "same")]
    assert list(trainings) == [key_of(places[0].head()) for places in trainings.values()]


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("digits", "digits"),
        ("digits:noise=0.3", "digits:noise=0.3"),
        ("voc:/data/bccd", "voc:bccd"),
        ("voc:/data/bccd/", "voc:bccd"),
        ("coco:cells", "coco:cells"),
    ],
)
def test_a_data_set_is_called_by_its_folder(source, label):
    assert data_label(source) == label


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [3]", "seed: [3]", "sections.second: unknown key 'seed'; known: data"),
        ("    seeds: [3]\n", "", "sections.second: seeds is missing"),
        ("[3, 4]", "3", "sections.first.seeds: expected a list, got 3"),
        ("[3, 4]", "[3, 3]", "sections.first.seeds: 3 is there twice"),
        ("[ghm, focal]", "[ghm, gmh]", "sections.first.methods: unknown method 'gmh'; known: ghm"),
        ("retinanet: [same,", "retinanet: [sane,", "methods.retinanet: unknown method 'sane'"),
        ("{retinanet: [same", "{yolo: [same", "sections.second.methods: unknown detector 'yolo'"),
        ("data: [clean]", "data: [dirty]", "sections.second.data: unknown data set 'dirty'"),
        (", cells: 20", "", "sections.first.steps: none for data set 'cells'"),
        ("cells: 20}", "cells: x}", "sections.first.steps.cells: expected a whole number, got 'x'"),
        ("steps: 10\n", "steps: 0\n", "sections.second: .*steps must be at least 1, got 0"),
        ("hflip: 0.5", "hflop: 0.5", "data.clean: unknown key 'hflop'"),
        ("hflip: 0.5", "hflip: 1.5", "data 'clean': hflip must lie in"),
        ("[96, 128]", "96", "data.clean.image_size: expected .*, got 96"),
        ("[96, 128]", "[96, 100]", r"image_size must be multiples of 32 .*, got \(96, 100\)"),
        ("channels: 16, ", "", "data.clean: channels is missing"),
        ("head_convs: 1", "head_conv: 1", "data.cells.config: unknown key 'head_conv'"),
        ("cls_loss: focal", "cls_los: focal", "methods.focal: unknown key 'cls_los'; known: con"),
        ("cls_loss: focal", "cls_loss: fokal", "method 'focal' .*must be one of .*'fokal'"),
        ("lr: 1,", "lr: true,", "methods.focal.lr: expected float, got True"),
        ("lr: 0.5", "data: x", "methods.focal.fcos: unknown key 'data'"),
        ("{cls_loss: focal", "{config: 1, cls_loss: focal", "methods.focal.config: expected a map"),
        ("  same:", "  ghm:", "key 'ghm' is there twice"),
        ("  same:", "  7:", "methods: 7 is not a name; put it in quotes"),
        ("sections:", "sections: [", "small.yaml"),
    ],
)
def test_a_mistake_is_named_with_its_place(grid, old, new, message):
    with pytest.raises(GridError, match=message) as error:
        grid(old, new).runs()
    assert str(error.value).count("small.yaml") >= 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # By the rules of `require_compatible`, by the configuration's, and by the adversary's.
        ("{fcos: {reg_loss: giou}}", "{}", "'ghm' with detector 'fcos', .*reg_loss must be iou or"),
        ("same: {", "same: {adversarial: asdn, ", "adversarial must be none for retinanet"),
        ("clean-anchors], f", "clean-anchors], fcos: [clean-anchors], f", "assigner must be iou"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_training(grid, old, new, message):
    with pytest.raises(GridError, match=f"small.yaml: sections.*: method .*{message}"):
        grid(old, new).runs()


def test_only_some_sections(grid, monkeypatch):
    small = grid()
    assert {run.section for run in small.runs(["second"])} == {"second"}
    with pytest.raises(GridError, match="unknown section 'third'; known: first, second"):
        small.runs(["third"])
    monkeypatch.delenv("CELLS")
    assert small.runs(["second"])  # which does not need it
    with pytest.raises(GridError, match=r"data.cells.source: .*variable CELLS is not set"):
        small.runs()


def test_two_folders_of_one_name_are_not_one_data_set(grid):
    with pytest.raises(
        GridError, match=r"'voc:/other/cells' and 'voc:/some.*' are both 'voc:cells'"
    ):
        grid("source: digits", "source: 'voc:/other/cells'").runs()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_grids_that_come_along(name, monkeypatch):
    """All methods are compatible and used, and the default's rivals are everywhere."""
    monkeypatch.setenv("BCCD_ROOT", "/somewhere/bccd")
    grid = Grid(GRIDS / f"{name}.yaml")
    runs = grid.runs()
    assert {run.grid for run in runs} == {name}
    asked = {run.method for run in runs}
    assert {"focal", "ce", "ghm", "ghm-paper", "ohem", "s-ohem", "sampling-free"} <= asked
    assert {"cleanliness", "ghm-rpn", "asdn", "astn", "asdn+astn", "bins-5", "ghm-iou"} <= asked
    assert {run.config.architecture for run in runs} == {"retinanet", "fcos", "faster-rcnn"}
    softmax = {run.method for run in runs if run.config.classifier == "softmax"}
    assert softmax == {"ce", "ohem", "s-ohem", "asdn", "astn", "asdn+astn"}
    converged = [run for run in runs if run.section == "convergence"]
    for method in ("focal", "ghm"):
        assert {
            (run.key()["data"], run.options.seed) for run in converged if run.method == method
        } == {
            (data, seed)
            for data in ("digits", "digits:noise=0.3", "voc:bccd")
            for seed in (1, 2, 3)
        }
