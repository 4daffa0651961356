import json

import pytest
from PIL import Image

from ghm_triton import cli
from ghm_triton.detection.data.digits import DigitScenes
from ghm_triton.detection.models.config import image_size
from ghm_triton.detection.training import loop
from ghm_triton.detection.training.checkpoint import Checkpoint

SMALL = "--data digits:images=16,held_out_images=4,size=96 --image-size 96x96 --channels 16"
REGIONS = ["--detector", "faster-rcnn"]
RUN = [*SMALL.split(), "--head-convs", "1", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def described(monkeypatch):
    """The options and the detector that `ghm train` would train with."""
    calls = []

    def remember(options, config, out, **kwargs):
        calls.append((options, config, kwargs))
        return loop.TrainResult(out / "checkpoint.pt", None)

    monkeypatch.setattr(loop, "train", remember)

    def describe(*words):
        assert cli.main(["train", "--out", "never-written", *words]) == 0
        return calls[-1]

    return describe


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
    ("flags", "expected"),
    [
        ("", {"architecture": "retinanet", "image_size": (128, 128), "channels": 64}),
        ("--detector fcos", {"architecture": "fcos", "classifier": "sigmoid", "reg_loss": "giou"}),
        ("--detector faster-rcnn --proposals 40", {"classifier": "sigmoid", "proposals": 40}),
        ("--detector faster-rcnn --cls-loss ce --reg-loss sl1", {"classifier": "softmax"}),
        (
            "--detector faster-rcnn --cls-loss ghm-softmax --reg-loss asl1",
            {"classifier": "softmax", "cls_loss": "ghm-softmax", "reg_loss": "asl1"},
        ),
        ("--reg-loss iou", {"classifier": "sigmoid", "reg_loss": "iou", "cls_loss": "ghm"}),
        (
            "--detector faster-rcnn --assigner cleanliness --adversarial asdn"
            " --adversarial-start 0 --no-sampling",
            {"assigner": "cleanliness", "adversarial": "asdn", "adversarial_start": 0.0}
            | {"sampling": False},
        ),
        (
            "--mining s-ohem --mining-keep 9 --cls-loss ce --guided-loss --init optimal",
            {"mining": "s-ohem", "mining_keep": 9, "guided_loss": True, "init": "optimal"},
        ),
        ("--init prior=0.03", {"init": "prior=0.03", "prior": 0.01}),
        ("--image-size 96x128 --prior 0.2", {"image_size": (96, 128), "prior": 0.2}),
    ],
)
def test_flags_become_options_and_defaults_follow(flags, expected, described):
    options, config, _ = described(*SMALL.split()[:2], *flags.split())
    values = {**options.to_dict(), **config.to_dict()}
    assert {name: values[name] for name in expected} == expected


def test_each_split_is_opened_once_for_priors_and_training(tmp_path, monkeypatch):
    opened = []
    original = DigitScenes.__init__

    def count(scenes, split, **options):
        opened.append(split)
        original(scenes, split, **options)

    monkeypatch.setattr(DigitScenes, "__init__", count)
    words = ["train", "--out", str(tmp_path), *RUN, "--steps", "1", "--init", "optimal"]
    assert cli.main(words) == 0
    assert opened == ["train", "val"]
    opened.clear()
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--device", "cpu"]) == 0
    assert opened == ["train", "val"]


def test_a_run_is_replaced_only_with_overwrite(tmp_path, capsys):
    words = ["train", "--out", str(tmp_path), *RUN, "--steps", "1"]
    assert cli.main(words) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    assert cli.main([*words, "--seed", "1"]) == 2
    assert f"{tmp_path / 'checkpoint.pt'} is there already: choose" in capsys.readouterr().err
    after = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    assert after == before
    assert cli.main([*words, "--seed", "1", "--overwrite"]) == 0
    assert Checkpoint.load(tmp_path / "checkpoint.pt").training["seed"] == 1


def coco(root, **images):
    """A COCO folder with one box of class `a` of `a, b` on each image of each split."""
    (root / "annotations").mkdir()
    (root / "images").mkdir()
    for split, names in images.items():
        content = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20]}
                for i in range(len(names))
            ],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
        for i, name in enumerate(names):
            if "missing" not in name:
                grey = Image.new("RGB", (64, 64), (40 * i, 90, 90))
                grey.save(root / "images" / name)
    return f"coco:{root}"


def test_damage_of_both_splits_is_reported_on_stderr(tmp_path, described, capsys):
    data = coco(tmp_path, train=["1.png", "missing-1.png"], val=["2.png", "missing-2.png"])
    described("--data", data)
    printed = capsys.readouterr()
    for name in ("missing-1.png", "missing-2.png"):
        assert f"skipped: {name}: the image is missing; image dropped" in printed.err
    assert printed.out == ""


def test_eval_prints_strict_json_and_nothing_else(tmp_path, capsys):
    data = coco(tmp_path, train=["1.png"], val=["2.png", "missing.png"])
    run = ["--image-size", "64x64", "--channels", "8", "--head-convs", "1", "--steps", "1"]
    out = tmp_path / "run"
    words = ["train", "--out", str(out), "--data", data, *run, "--batch-size", "1"]
    assert cli.main([*words, "--device", "cpu"]) == 0
    capsys.readouterr()
    words = ["eval", str(out / "checkpoint.pt"), "--split", "val", "--device", "cpu", "--json"]
    assert cli.main(words) == 0
    printed = capsys.readouterr()

    def refuse(constant):
        raise ValueError(constant)

    result = json.loads(printed.out, parse_constant=refuse)
    assert result["per_class"]["b"] == [None, None]  # no box of it is held out
    assert result["images"] == 1
    assert "skipped: missing.png" in printed.err


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
