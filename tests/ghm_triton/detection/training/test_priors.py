import dataclasses
import json

import pytest
import torch

from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.data.loader import TrainingView
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training import priors
from ghm_triton.detection.training.build import build_losses
from ghm_triton.detection.training.checkpoint import CHECKPOINT, Checkpoint
from ghm_triton.detection.training.hooks import METRICS
from ghm_triton.detection.training.loop import train
from ghm_triton.detection.training.priors import (
    COUNTS,
    count_data_priors,
    start_at_prior,
    start_proposals,
)
from ghm_triton.imbalance.sampling_free import optimal_prior


@pytest.fixture
def dataset(options):
    return open_dataset(options.data, "train")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What another test counted is not there."""
    monkeypatch.setattr(priors, "_counted", {})


def optimal(options, **changes):
    return dataclasses.replace(options, init="optimal", **changes)


@pytest.mark.parametrize("architecture", ["retinanet", "fcos"])
def test_the_assigner_is_run_over_every_image(architecture, options, config, dataset, tmp_path):
    config = dataclasses.replace(config, architecture=architecture)
    view = TrainingView(dataset, config, (0.0, 0.0))
    targets = [view[index, 0][1] for index in range(len(dataset))]
    labels = build_detector(config).labels(targets)
    counted = count_data_priors(config, dataset)
    assert counted.anchors == int((labels >= 0).sum())
    assert counted.positives.tolist() == [int((labels == c).sum()) for c in range(10)]
    prior = optimal_prior(int(counted.positives.sum()), counted.anchors, 10)
    started = start_at_prior(optimal(options), config, dataset, tmp_path)
    assert started == dataclasses.replace(config, prior=prior)
    assert 1e-4 < prior < 0.1


def test_the_network_is_not_run(config, dataset, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was run")

    monkeypatch.setattr("ghm_triton.detection.models.retinanet.RetinaNetDetector.raw", refuse)
    assert count_data_priors(config, dataset).anchors > 0


def test_many_images_are_sampled_evenly(config, dataset, monkeypatch):
    seen = []
    original = TrainingView.__getitem__
    monkeypatch.setattr(
        TrainingView, "__getitem__", lambda view, draw: seen.append(draw[0]) or original(view, draw)
    )
    monkeypatch.setattr(priors, "MOST_IMAGES", 4)
    counted = count_data_priors(config, dataset)
    assert seen == [0, 16, 32, 48]
    assert counted.anchors > 0


def test_a_prior_is_chosen_by_number_or_left_alone(options, config, dataset, tmp_path):
    chosen = dataclasses.replace(options, init="prior=0.05")
    assert start_at_prior(chosen, config, dataset, tmp_path).prior == 0.05
    assert start_at_prior(options, config, dataset, tmp_path) is config
    assert not (tmp_path / COUNTS).exists()


def counting(monkeypatch):
    """How often the data was gone through."""
    calls = []
    original = priors.count_data_priors
    monkeypatch.setattr(
        priors, "count_data_priors", lambda *given: calls.append(1) or original(*given)
    )
    return calls


def test_what_was_counted_is_kept_for_this_data_and_detector(
    options, config, dataset, tmp_path, monkeypatch
):
    calls = counting(monkeypatch)
    first = start_at_prior(optimal(options), config, dataset, tmp_path)
    again = dataclasses.replace(config, prior=0.3, channels=24)
    assert start_at_prior(optimal(options), again, dataset, tmp_path).prior == first.prior
    assert len(calls) == 1
    other = dataclasses.replace(config, anchor_scale=4.0)
    assert start_at_prior(optimal(options), other, dataset, tmp_path).prior != first.prior
    noisy = optimal(options, data=options.data + ",noise=0.5")
    start_at_prior(noisy, config, open_dataset(noisy.data, "train"), tmp_path)
    assert len(calls) == 3


def test_only_a_resumed_run_believes_the_file(options, config, dataset, tmp_path, monkeypatch):
    started = start_at_prior(optimal(options), config, dataset, tmp_path)
    kept = json.loads((tmp_path / COUNTS).read_text())
    assert kept["prior"] == started.prior
    kept["statistics"]["anchors"] *= 2
    altered = json.dumps(kept)
    calls = counting(monkeypatch)
    for resume, factor, read in ((True, 0.5, 0), (False, 1.0, 1)):
        monkeypatch.setattr(priors, "_counted", {})
        (tmp_path / COUNTS).write_text(altered)
        again = start_at_prior(optimal(options), config, dataset, tmp_path, resume=resume)
        assert again.prior == pytest.approx(factor * started.prior, rel=1e-12)  # one division
        assert len(calls) == read


@pytest.mark.parametrize("content", ["{", "[]", '{"key": 1}', '{"statistics": {"a": 1}, "key": 2}'])
def test_a_damaged_file_is_counted_anew(content, options, config, dataset, tmp_path):
    (tmp_path / COUNTS).write_text(content)
    started = start_at_prior(optimal(options), config, dataset, tmp_path, resume=True)
    assert 0 < started.prior < 0.01
    assert json.loads((tmp_path / COUNTS).read_text())["prior"] == started.prior


def test_a_run_starts_at_the_counted_prior_and_says_so(options, config, dataset, tmp_path):
    chosen = optimal(options, steps=1)
    train(chosen, config, tmp_path, device="cpu", progress=False)
    saved = Checkpoint.load(tmp_path / CHECKPOINT)
    expected = start_at_prior(chosen, config, dataset, tmp_path / "elsewhere").prior
    assert saved.config.prior == expected
    assert saved.training["init"] == "optimal"
    first = json.loads((tmp_path / METRICS).read_text().splitlines()[0])
    assert first["classification"] > 0


@pytest.mark.parametrize("init", ["best", "prior=", "prior=0", "prior=1.5", "prior=x", "p=0.1"])
def test_an_init_that_is_none_is_named(init, options):
    with pytest.raises(ValueError, match=r"init must be optimal, or prior=P .*got '" + init):
        dataclasses.replace(options, init=init)


def regions(config, **changes):
    return dataclasses.replace(config, architecture="faster-rcnn", **changes)


def start_of(options, config, dataset, out):
    """The probability that the objectness of a new detector starts from."""
    losses = build_losses(options, architecture="faster-rcnn", assigner=config.assigner)
    detector = build_detector(config, losses)
    start_proposals(options, detector, dataset, out)
    bias = detector.rpn.head.cls_logits.bias
    assert bias.unique().numel() == 1
    return float(torch.sigmoid(bias[0].detach().double())), detector.rpn


@pytest.mark.parametrize(
    ("sampling", "assigner"), [(True, "iou"), (False, "iou"), (True, "cleanliness")]
)
def test_proposals_start_at_the_share_of_positives(
    sampling, assigner, options, config, dataset, tmp_path
):
    """Of the anchors that they learn from: 256 of an image where they are sampled."""
    config = regions(config, assigner=assigner)
    chosen = optimal(options, sampling=sampling)
    start, rpn = start_of(chosen, config, dataset, tmp_path)
    view = TrainingView(dataset, config, (0.0, 0.0))
    rows, _ = rpn.assign_targets_to_anchors(
        [rpn.anchors] * len(dataset), [view[i, 0][1] for i in range(len(dataset))]
    )
    rows = torch.stack(rows)
    positives, counted = (rows == 1).sum(1), (rows >= 0).sum(1)
    if assigner == "iou" and sampling:
        positives = positives.clamp(max=128)
        counted = (positives + (rows == 0).sum(1)).clamp(max=256)
        assert counted.tolist() == [256] * len(dataset)
    share = int(positives.sum()) / int(counted.sum())
    assert start == pytest.approx(share, rel=1e-6)  # a float32 bias
    kept = json.loads((tmp_path / COUNTS).read_text())
    assert kept["prior"] == share
    assert kept["statistics"]["class_names"] == ["object"]


def test_regions_keep_their_own_prior(options, config, dataset, tmp_path):
    """What share of them is positive depends on what is proposed, which no target tells."""
    config = regions(config, prior=0.02)
    assert start_at_prior(optimal(options), config, dataset, tmp_path) is config
    assert not (tmp_path / COUNTS).exists()


def test_sampled_proposals_start_as_they_did_unless_asked(options, config, dataset, tmp_path):
    assert start_of(options, regions(config), dataset, tmp_path)[0] == 0.5
    clean = regions(config, assigner="cleanliness")
    assert start_of(options, clean, dataset, tmp_path)[0] != pytest.approx(0.01, rel=0.1)


def test_proposals_that_sample_are_counted_apart(options, config, dataset, tmp_path):
    config = regions(config)
    starts = {
        start_of(optimal(options, sampling=sampling), config, dataset, tmp_path)[0]
        for sampling in (False, True)
    }
    assert len(starts) == 2


def test_without_positives_only_who_asked_is_told(options, config, tmp_path, monkeypatch):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    monkeypatch.setattr(priors, "_targets", lambda *_: iter([[nothing]]))
    data = open_dataset(options.data, "train")
    clean = regions(config, assigner="cleanliness", prior=0.03)
    assert start_of(options, clean, data, tmp_path)[0] == pytest.approx(0.03, rel=1e-6)
    with pytest.raises(ValueError, match="no positive among"):
        start_of(optimal(options), clean, data, tmp_path)


def test_a_dense_detector_has_no_proposals_to_start(options, config, dataset, tmp_path):
    detector = build_detector(config)
    start_proposals(optimal(options), detector, dataset, tmp_path)
    assert not (tmp_path / COUNTS).exists()
