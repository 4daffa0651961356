import json

import pytest

from ghm_triton import cli
from ghm_triton.detection.models.config import image_size
from ghm_triton.detection.training.checkpoint import Checkpoint

SMALL = "--data digits:images=16,held_out_images=4,size=96 --image-size 96x96 --channels 16"
REGIONS = ["--detector", "faster-rcnn"]
RUN = [*SMALL.split(), "--head-convs", "1", "--batch-size", "4", "--device", "cpu"]


def test_train_goes_from_flags_to_a_checkpoint(tmp_path, capsys):
    flags = [*RUN, "--steps", "4", "--cls-loss", "focal", "--reg-loss", "sl1", "--lr", "0.001"]
    assert cli.main(["train", "--out", str(tmp_path), *flags]) == 0
    saved = Checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved.training["cls_loss"] == "focal"
    assert saved.training["step"] == 4
    assert (saved.config.image_size, saved.config.channels) == ((96, 96), 16)
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert "split val" in printed


@pytest.mark.parametrize(
    ("flags", "built", "trained_by"),
    [
        ("--detector fcos", ("fcos", "sigmoid", 300), ("ghm", "giou")),
        (
            "--detector faster-rcnn --proposals 40",
            ("faster-rcnn", "sigmoid", 40),
            ("ghm", "ghm"),
        ),
        (
            "--detector faster-rcnn --cls-loss ce --reg-loss sl1",
            ("faster-rcnn", "softmax", 300),
            ("ce", "sl1"),
        ),
        (
            "--detector faster-rcnn --cls-loss ghm-softmax --reg-loss asl1",
            ("faster-rcnn", "softmax", 300),
            ("ghm-softmax", "asl1"),
        ),
        ("--reg-loss iou", ("retinanet", "sigmoid", 300), ("ghm", "iou")),
    ],
)
def test_the_detector_is_a_flag_and_its_losses_follow(flags, built, trained_by, tmp_path):
    assert cli.main(["train", "--out", str(tmp_path), *RUN, "--steps", "1", *flags.split()]) == 0
    saved = Checkpoint.load(tmp_path / "checkpoint.pt")
    config = saved.config
    assert (config.architecture, config.classifier, config.proposals) == built
    assert (saved.training["cls_loss"], saved.training["reg_loss"]) == trained_by


def test_clean_anchors_and_adversaries_are_flags(tmp_path):
    flags = "--detector faster-rcnn --proposals 40 --assigner cleanliness --adversarial asdn"
    words = [*RUN, "--steps", "1", *flags.split(), "--adversarial-start", "0"]
    assert cli.main(["train", "--out", str(tmp_path), *words]) == 0
    saved = Checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved.config.assigner == "cleanliness"
    assert (saved.training["adversarial"], saved.training["adversarial_start"]) == ("asdn", 0.0)
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert 0 <= metrics["adversary"] < 0.01  # joint from the first step


def test_mining_guided_loss_and_the_prior_are_flags(tmp_path):
    flags = "--mining s-ohem --mining-keep 9 --cls-loss ce --guided-loss --init optimal"
    words = ["train", "--out", str(tmp_path), *RUN, "--steps", "1", *flags.split()]
    assert cli.main(words) == 0
    saved = Checkpoint.load(tmp_path / "checkpoint.pt")
    kept = {name: saved.training[name] for name in ("mining", "mining_keep", "guided_loss", "init")}
    assert kept == {"mining": "s-ohem", "mining_keep": 9, "guided_loss": True, "init": "optimal"}
    counted = json.loads((tmp_path / "priors.json").read_text())
    assert saved.config.prior == counted["prior"] != 0.01
    more = ["train", "--out", str(tmp_path), "--resume", "--device", "cpu"]
    assert cli.main(more) == 0
    assert Checkpoint.load(tmp_path / "checkpoint.pt").config == saved.config


def test_init_and_prior_are_two_names_of_a_number(tmp_path):
    words = ["train", "--out", str(tmp_path), *RUN, "--steps", "1", "--init", "prior=0.03"]
    assert cli.main(words) == 0
    assert Checkpoint.load(tmp_path / "checkpoint.pt").config.prior == 0.03


def test_resume_takes_its_options_from_the_checkpoint(tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path), *RUN, "--steps", "2"]) == 0
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--device", "cpu"]) == 0
    assert Checkpoint.load(tmp_path / "checkpoint.pt").training["step"] == 2


def test_eval_prints_what_it_computed(trained, capsys):
    assert cli.main(["eval", str(trained), "--split", "test", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 12
    assert set(result["per_class"]) == set("0123456789")


def test_thresholds_print_and_plot(trained, tmp_path, capsys):
    picture = tmp_path / "t.png"
    flags = ["--policy", "fixed=0.25", "--plot", str(picture)]
    assert cli.main(["thresholds", str(trained), *flags]) == 0
    assert "policy 'fixed=0.25'" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert cli.main(["thresholds", str(trained), "--policy", "prior", "--json"]) == 0
    printed = capsys.readouterr()
    assert "ghm: warning: class '7' was never a positive in training" in printed.err
    entries = json.loads(printed.out)["entries"]
    assert [entry["name"] for entry in entries] == list("0123456789")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "faces"], "unknown data set 'faces'"),
        (["train", "--image-size", "100x96"], "image_size must be multiples of 32"),
        (["train", "--cls-loss", "ghm-softmax"], "needs a softmax classifier, as faster-rcnn can"),
        (["train", "--init", "best"], "init must be optimal, or prior=P with P in (0, 1); got"),
        (
            ["train", "--init", "optimal", "--prior", "0.1"],
            "--prior 0.1 and --init optimal exclude",
        ),
        (["train", "--mining-keep", "9"], "--mining-keep has no meaning without --mining"),
        (["train", "--mining", "ohem", "--mining-keep", "0"], "mining_keep must be at least 1"),
        (
            ["train", *REGIONS, "--mining", "s-ohem", "--region-samples", "9"],
            "--region-samples has no meaning with --mining s-ohem, which keeps",
        ),
        (
            ["train", *REGIONS, "--no-sampling", "--region-samples", "9"],
            "--region-samples has no meaning with --no-sampling, which trains on all regions",
        ),
        (
            ["train", *REGIONS, "--no-sampling", "--no-guided-loss", "--data", "faces"],
            "sampling=False needs guided_loss: unguided, background drowns",
        ),
        (
            ["train", "--no-sampling"],
            "--sampling does not fit --detector retinanet: it is trained on",
        ),
        (
            ["train", *REGIONS, "--cls-loss", "ghm-softmax", "--init", "prior=0.1"],
            "--init prior=0.1 does not fit --cls-loss ghm-softmax: a softmax has no such bias",
        ),
        (["train", "--strength", "3"], "strength must lie in [0, 1], got 3.0"),
        (["train", "--reg-weight", "-1"], "reg_weight must be finite and not negative, got -1.0"),
        (
            ["train", "--cls-weight", "0", "--data", "faces"],  # which is not looked for
            "cls_weight must be positive with guided_loss, which scales one loss to the other; got",
        ),
        (["train", "--train-split", "everything"], "unknown split 'everything'"),
        (["train", "--resume"], "no such checkpoint"),
        (["train", "--detector", "fcos", "--reg-loss", "ghm"], "GHM-R and smooth L1 are losses of"),
        (["train", "--detector", "fcos", "--anchor-scale", "4"], "fcos: it has no anchors"),
        (["train", "--proposals", "9"], "--detector retinanet: it has one stage"),
        (["train", "--detector", "fcos", "--region-samples", "9"], "it is trained on every point"),
        (
            ["train", "--detector", "faster-rcnn", "--cls-loss", "ce", "--prior", "0.1"],
            "--prior 0.1 does not fit --cls-loss ce",
        ),
        (["train", "--detector", "faster-rcnn", "--proposals", "0"], "proposals must be at least"),
        (
            ["train", "--adversarial", "asdn"],
            "adversarial must be none for retinanet, which",
        ),
        (["train", "--adversarial-start", "0.5"], "it has one stage, and no regions to make"),
        (
            ["train", "--detector", "fcos", "--assigner", "cleanliness"],
            "assigner must be iou for fcos, which has no anchors",
        ),
        (
            ["train", "--assigner", "cleanliness", "--mining", "ohem"],
            "mining must be none with assigner cleanliness",
        ),
    ],
)
def test_a_wrong_flag_is_one_sentence(words, message, tmp_path, capsys):
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_says_what_a_flag_comes_to(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "since the classification is scaled along with it: balance" in printed
    assert "of GHM-R after --steps batches with boxes, which are all" in printed


def test_an_unknown_policy_lists_the_known(trained, capsys):
    assert cli.main(["thresholds", str(trained), "--policy", "best"]) == 2
    assert "unknown policy 'best'; choose from prior, f1" in capsys.readouterr().err


def test_image_size_reads_height_first():
    assert image_size("256x320") == (256, 320)
    with pytest.raises(Exception, match="expected HEIGHTxWIDTH"):
        image_size("256")
