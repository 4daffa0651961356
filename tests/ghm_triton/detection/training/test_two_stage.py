"""From options to proposals' loss and regions' adversary; and training by them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.rpn import CleanProposalNetwork
from ghm_triton.detection.training.build import build_losses
from ghm_triton.detection.training.checkpoint import CHECKPOINT, Checkpoint
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.hooks import METRICS
from ghm_triton.detection.training.loop import train
from ghm_triton.losses.schedule import StrengthSchedule

FEW = "digits:images=16,held_out_images=2,size=96"


@pytest.fixture
def config(config: DetectorConfig) -> DetectorConfig:
    return dataclasses.replace(
        config, architecture="faster-rcnn", assigner="cleanliness", proposals=50, region_samples=32
    )


def quietly(options: TrainOptions, config: DetectorConfig, out: Path, **kwargs: object) -> None:
    train(options, config, out, device="cpu", progress=False, **kwargs)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_the_objectness_learns_as_the_options_say():
    options = TrainOptions(bins=12, strength=0.75, average="valid", cls_loss="focal")
    build = {"architecture": "faster-rcnn", "assigner": "cleanliness"}
    loss = build_losses(options, **build).objectness
    assert loss.density.bins == 12
    assert loss.average == "valid"
    assert loss.density.strength == pytest.approx(0.75)
    falling = dataclasses.replace(options, strength_end=0.0)
    own = build_losses(falling, **build).objectness.density
    assert isinstance(own.strength, StrengthSchedule) or own.strength != 0.75
    assert build_losses(options, architecture="faster-rcnn").objectness is None
    assert build_losses(options, assigner="cleanliness").objectness is None


def test_the_adversary_starts_after_a_share_of_the_steps():
    options = TrainOptions(adversarial="asdn", steps=300, adversarial_start=0.1)
    adversary = build_losses(options, architecture="faster-rcnn").adversary(8)
    assert adversary.start == 30
    assert adversary.astn is None
    assert build_losses(TrainOptions(), architecture="faster-rcnn").adversary is None


@pytest.mark.parametrize(("architecture", "reg_loss"), [("retinanet", "ghm"), ("fcos", "giou")])
def test_one_stage_detectors_have_no_regions_to_make_harder(architecture, reg_loss):
    options = TrainOptions(adversarial="astn", reg_loss=reg_loss)
    with pytest.raises(ValueError, match=f"must be none for {architecture}.*one stage.*'astn'"):
        build_losses(options, architecture=architecture)


@pytest.mark.parametrize(("field", "value"), [("adversarial", "gan"), ("adversarial_start", 1.5)])
def test_an_option_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        TrainOptions(**{field: value})


@pytest.mark.slow
def test_a_run_with_all_of_it_resumes_bit_for_bit(options, config, tmp_path):
    """Broken off while the adversary is still alone, and gone on with where it joins."""
    options = dataclasses.replace(
        options, data=FEW, steps=4, checkpoint_every=4, adversarial="asdn+astn"
    )
    options = dataclasses.replace(options, adversarial_start=0.5)
    quietly(options, config, tmp_path / "whole")
    quietly(options, config, tmp_path / "broken", stop_after=1)
    quietly(options, config, tmp_path / "broken", resume=True)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    whole, broken = (Checkpoint.load(tmp_path / x / CHECKPOINT) for x in ("whole", "broken"))
    assert whole.model.keys() == broken.model.keys()
    assert all(torch.equal(whole.model[key], broken.model[key]) for key in whole.model)
    assert int(whole.model["adversary.batches"]) == 4
    # Alone it learns at full weight; afterwards little, or nothing where no mask hurt.
    adversary = [line["adversary"] for line in metrics(tmp_path / "whole")]
    assert min(adversary[:2]) > 0.1
    assert max(adversary[2:]) < 0.0025 * 2


def test_the_detector_of_a_checkpoint_is_without_its_adversary(options, config, tmp_path):
    options = dataclasses.replace(options, data=FEW, adversarial="asdn+astn", steps=1)
    quietly(options, config, tmp_path)
    detector = Checkpoint.load(tmp_path / CHECKPOINT).detector()
    assert detector.adversary is None
    assert isinstance(detector.rpn, CleanProposalNetwork)
    assert not any("adversary" in key or "_loss" in key for key in detector.state_dict())


def test_proposals_start_at_the_share_of_positives(options, config, tmp_path):
    """At the optimum, not at the configuration's 0.01: about a quarter of these anchors learn."""
    still = dataclasses.replace(options, data=FEW, steps=1, lr=1e-12, warmup=1)
    quietly(still, config, tmp_path)
    bias = Checkpoint.load(tmp_path / CHECKPOINT).model["rpn.head.cls_logits.bias"]
    assert bias.unique().numel() == 1
    share = float(torch.sigmoid(bias[0]))
    assert 0.05 < share < 0.6


@pytest.mark.slow
def test_the_losses_fall(options, config, tmp_path):
    options = dataclasses.replace(
        options, data=FEW, steps=20, checkpoint_every=20, adversarial="asdn+astn"
    )
    quietly(options, config, tmp_path)
    lines = metrics(tmp_path)
    # Not the objectness: its labels rise as boxes get better.
    for name in ("rpn_box", "unguided_classification"):
        first, last = ([line[name] for line in rows] for rows in (lines[:4], lines[-8:]))
        assert sum(last) / 8 < 0.95 * sum(first) / 4, name
