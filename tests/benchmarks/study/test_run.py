"""One small real run: its row is complete and correct."""

import json

import pytest
import torch

import benchmarks.study.run as study_run
from benchmarks.provenance import source_digest
from benchmarks.study.grid import Grid
from benchmarks.study.plan import key_of
from benchmarks.study.run import gradients, measure, stretches
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.evaluate import Detections, detect
from ghm_triton.detection.training.build import REPORT_EVERY
from ghm_triton.evidence import SCORE_FLOOR
from ghm_triton.losses import focal_loss

DATA = "digits:images=40,held_out_images=10,size=96"
STEPS = REPORT_EVERY + 4
GRID = """
data: {{tiny: {{source: "{data}", image_size: [96, 96], channels: 16, batch_size: 4, warmup: 2}}}}
methods: {{ghm: {{lr: 0.001234567, fcos: {{reg_loss: giou}}}}, lost: {{lr: 1.0e+6, clip: 1.0e+9}}}}
sections:
  a: {{data: [tiny], detectors: [{detector}], methods: [{method}], seeds: [1], steps: {steps}}}
"""


def make(folder, detector="retinanet", method="ghm", steps=STEPS):
    path = folder / "tiny.yaml"
    path.write_text(GRID.format(data=DATA, detector=detector, method=method, steps=steps))
    (run,) = Grid(path).runs()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("grid"))


def with_a_faint_one(*args):
    """Detect, and add to each image a detection below the recorded scores."""
    for sample, found in detect(*args):
        scores = torch.cat([found.scores, torch.tensor([SCORE_FLOOR / 2])])
        boxes, labels = (torch.cat([x, x[:1]]) for x in (found.boxes, found.labels))
        yield sample, Detections(boxes, scores, labels)


@pytest.fixture(scope="module")
def watched(run):
    """The row, and the results of training and evaluation that it was made from."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        names = ("train", "torch_predictor", "score", "mean_average_precision")
        for name in (*names, "gradient_norms_by_target", "_curves"):
            original = getattr(study_run, name)

            def noted(*args, original=original, name=name, **kwargs):
                if name == "_curves":
                    seen["metrics"] = [json.loads(x) for x in args[0].read_text().splitlines()]
                seen[name] = original(*args, **kwargs)
                seen[f"{name} of"] = args
                return seen[name]

            patch.setattr(study_run, name, noted)
        patch.setattr(study_run, "detect", with_a_faint_one)
        return measure(run), seen


def test_the_row_is_json_with_every_field_of_the_schema(run, watched):
    row, _ = watched
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert {name: row[name] for name in run.head()} == run.head()
    assert key_of(row) == key_of(run.key())
    measured = {"ap", "ap50", "ap75", "ap_per_class", "val_ap", "seconds", "step_ms", "curves"}
    assert measured | {"gradient_norms", "policies", "total_seconds"} <= row.keys()
    assert row["source"] == source_digest()
    assert row["cpu_threads"] == torch.get_num_threads()


def test_precision_is_that_of_the_test_split(watched):
    row, seen = watched
    found = seen["mean_average_precision"]
    assert found.images == 10
    _, results = seen["mean_average_precision of"]
    scores = torch.cat([detections.scores for _, detections in results])
    assert float(scores.min()) >= SCORE_FLOOR  # as everywhere else that precision is reported
    assert row["ap"] == pytest.approx(found.ap, rel=1e-5)  # of 6 digits
    assert row["ap50"] == pytest.approx(found.ap50, rel=1e-5)
    assert row["ap75"] == pytest.approx(found.ap75, rel=1e-5)
    test = open_dataset(DATA, "test")
    there = {test.class_names[int(k)] for i in range(10) for k in test[i].labels}
    assert {name for name, (ap, _) in row["ap_per_class"].items() if ap is not None} == there
    assert row["val_ap"] == pytest.approx(seen["train"].held_out.ap, rel=1e-5)
    assert row["val_ap"] != row["ap"]


def test_curves_are_the_metrics_of_training(watched):
    row, seen = watched
    curves = row["curves"]
    assert curves["step"] == list(range(1, STEPS + 1))  # fewer steps than points: one each
    for name in ("classification", "unguided_classification", "bbox_regression", "grad_norm"):
        expected = [line[name] for line in seen["metrics"]]
        assert curves[name] == pytest.approx(expected, rel=1e-5)


def test_long_curves_are_means_over_equal_stretches(tmp_path):
    lines = [{name: float(i) for name in study_run.CURVES} for i in range(130)]
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = study_run._curves(tmp_path / "m")
    assert len(curves["step"]) == 60
    starts = [0, *curves["step"][:-1]]
    for start, end, mean in zip(starts, curves["step"], curves["grad_norm"], strict=True):
        assert end - start in (2, 3)
        assert mean == pytest.approx((start + end - 1) / 2)
    assert stretches(600) == list(range(10, 601, 10))


def test_gradient_norms_are_counted_of_training_images(watched):
    row, seen = watched
    for name, norms in zip(
        ("positives", "negatives"), seen["gradient_norms_by_target"], strict=True
    ):
        counts = row["gradient_norms"][name]
        assert len(counts) == 30
        assert sum(counts) == len(norms) > 0
        assert counts == torch.histc(norms.double(), 30, 0.0, 1.0).int().tolist()
    # All 40 images have their say: anchors times classes, but for the ignored ones.
    anchors = 40 * 10 * 9 * (12**2 + 6**2 + 3**2)
    counted = sum(sum(row["gradient_norms"][name]) for name in ("positives", "negatives"))
    assert 0.9 * anchors < counted <= anchors


def test_gradients_are_summed_as_they_are():
    positives, negatives = torch.tensor([0.1, 0.9]), torch.tensor([0.01, 0.02, 0.9])
    sums = gradients(positives, negatives, 2)
    assert sums["ce"] == pytest.approx([0.13, 1.8])
    logits = torch.logit(torch.cat([1 - positives, negatives]).double()).requires_grad_()
    focal_loss(logits, torch.tensor([1.0, 1, 0, 0, 0]), reduction="sum").backward()
    slopes = logits.grad.abs()
    expected = [float(slopes[[0, 2, 3]].sum()), float(slopes[[1, 4]].sum())]
    assert sums["focal"] == pytest.approx(expected, rel=1e-6)  # the norms were float32


def test_policies_measure_on_test_what_was_chosen_on_val(watched):
    row, seen = watched
    assert list(row["policies"]) == ["f1", "prior", "precision=0.9", "fixed=0.5", "single"]
    assert set(row["policies"]["fixed=0.5"]["thresholds"].values()) == {0.5}
    prior = row["policies"]["prior"]["thresholds"]
    assert min(prior.values()) < 0.005  # below what statistics record, and scored all the same
    # All that may stand by any policy is looked at.
    _, floor = seen["torch_predictor of"]
    lowest = [min(p["thresholds"][name] for p in row["policies"].values()) for name in prior]
    assert floor.tolist() == pytest.approx([min(x, SCORE_FLOOR) for x in lowest], rel=1e-5)
    _, results, _ = seen["score of"]
    assert len(results) == 10


@pytest.mark.parametrize("detector", ["fcos", "faster-rcnn"])
def test_the_other_detectors(detector, tmp_path):
    row = measure(make(tmp_path, detector, steps=2))
    assert row["detector"] == detector
    assert (row["gradient_norms"] is None) == (detector == "faster-rcnn")
    assert len(row["curves"]["classification"]) == 2
