"""Verdicts of the claims from fabricated rows."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import claims
from benchmarks.claims import ABSENT, CLAIMS, FAILS, HOLDS, judge, table

ROOT = Path(__file__).parents[2]
BOTH = "forward+backward"


def ghm(entries=2**26, dtype="float32", target="index", **figures):
    key = {"task": "classification", "entries": entries, "dtype": dtype, "target": target}
    row = {**key, "loss": "ghm_c triton", "stage": BOTH, "device": "cuda", "gpu": "H100"}
    ratios = {
        "ghm_c released": 1 / 41,
        "bce one-hot compiled": 0.99,
        "bce compiled": 0.6,
        "bce": 0.5,
    } | figures.pop("ratios", {})
    return row | {"share_of_copy": 0.86, "peak_ratio": 1.04, "ratios": ratios} | figures


def step(ratio, of="bce", **figures):
    row = {"task": "retinanet", "stage": "step", "loss": "ghm", "device": "cuda", "gpu": "H100"}
    return row | {"ratios": {of: ratio}, "image_size": [800, 1066], **figures}


def cpu(loss="ghm_c torch", target="index", **ratios):
    key = {"task": "t", "entries": 10**6, "dtype": "float32", "target": target, "device": "cpu"}
    return {**key, "loss": loss, "stage": BOTH, "cpu": "EPYC", "gpu": None, "ratios": ratios}


def repeated(differing, **figures):
    row = {"stage": "repeat", "device": "cuda", "loss": "ghm_c", "gpu": "H100", "shape": [1, 2]}
    return row | {"differing": differing, **figures}


def verdict(rows, words):
    (found,) = [each for each in judge(rows) if all(word in each["claim"] for word in words)]
    return found


def test_nothing_measured():
    verdicts = judge([])
    assert len(verdicts) == len(CLAIMS)
    assert {each["verdict"] for each in verdicts} == {ABSENT}
    assert {each["measured"] for each in verdicts} == {None}


def peer(name):
    """Make rows from a ratio to a peer."""
    return lambda ratio: ghm(ratios={name: ratio})


def share(dtype):
    return lambda value: ghm(dtype=dtype, share_of_copy=value)


def faster(name, of):
    """Make rows from how many times as fast as a peer they are."""
    return lambda times: of(**{name: 1 / times})


def half(**ratios):
    return ghm(dtype="bfloat16", ratios=ratios)


# Claim, its rows by figure, a figure that just holds and one that just does not.
EDGES = [
    (("float32", "12 bytes"), share("float32"), 0.85, 0.849),
    (("bfloat16", "6 bytes"), share("bfloat16"), 0.85, 0.849),
    (("float32", "MMDetection"), faster("ghm_c released", lambda **r: ghm(ratios=r)), 40, 39),
    (("bfloat16", "MMDetection"), faster("ghm_c released", half), 40, 39),
    (("float32", "same class indices"), peer("bce one-hot compiled"), 1.0, 1.01),
    (("float32", "ready made"), peer("bce compiled"), 1.0, 1.01),
    (("GHM-C, 2^23", "memory"), lambda ratio: ghm(peak_ratio=ratio), 1.05, 1.051),
    (
        ("GHM-R, 2^23", "memory"),
        lambda ratio: ghm(target="dense") | {"loss": "ghm_r triton", "peak_ratio": ratio},
        1.05,
        1.06,
    ),
    (("step", "times plain"), step, 1.02, 1.021),
    (("step", "times compiled"), lambda ratio: step(ratio, "bce compiled"), 1.02, 1.03),
    (("CPU", "GHM-C", "index", "plain"), lambda ratio: cpu(bce=ratio), 2.0, 2.01),
    (
        ("CPU", "GHM-C", "dense", "MMDetection"),
        faster("ghm_c released", partial(cpu, target="dense")),
        5,
        4,
    ),
    (
        ("CPU", "GHM-R"),
        faster("ghm_r released", partial(cpu, "ghm_r torch", "dense")),
        5,
        4,
    ),
    (("repeated",), repeated, 0, 1),
]


@pytest.mark.parametrize(("words", "row", "just", "missed"), EDGES)
def test_every_bound(words, row, just, missed):
    assert verdict([row(just)], words)["verdict"] == HOLDS
    failed = verdict([row(missed)], words)
    assert failed["verdict"] == FAILS
    assert failed["measured"] == pytest.approx(missed)


def test_the_worst_size_decides_and_is_named():
    sizes = {2**25: 0.9, 2**26: 0.8, 2**28: 0.95}
    rows = [ghm(entries=size, share_of_copy=share) for size, share in sizes.items()]
    found = verdict(rows, ("float32", "12 bytes"))
    assert (found["verdict"], found["measured"]) == (FAILS, 0.8)
    assert str(2**26) in found["where"]
    assert "worst of 3" in found["where"]
    assert "H100" in found["where"]


def test_other_sizes_targets_and_stages_do_not_count():
    others = [
        ghm(entries=2**23, share_of_copy=0.1, peak_ratio=1.0),
        ghm(target="dense", share_of_copy=0.1),
        ghm(stage="graph", share_of_copy=0.1),
        ghm(device="cpu", share_of_copy=0.1),
        ghm(dtype="float16", share_of_copy=0.1),
        ghm(loss="ghm_c torch", share_of_copy=0.1),
    ]
    assert verdict(others, ("float32", "12 bytes"))["verdict"] == ABSENT
    assert verdict([*others, ghm()], ("float32", "12 bytes"))["verdict"] == HOLDS
    assert verdict([ghm(entries=2**22)], ("GHM-C, 2^23",))["verdict"] == ABSENT


def test_an_error_is_no_success():
    key = {"task": "classification", "entries": 2**25, "dtype": "float32", "target": "index"}
    broken = {**key, "loss": "ghm_c triton", "stage": BOTH, "device": "cuda", "gpu": "H100"}
    broken["error"] = "OutOfMemoryError: too large | by far\nand more"
    alone = verdict([broken], ("float32", "12 bytes"))
    assert alone["verdict"] == ABSENT
    assert "too large" in alone["where"]
    beside = verdict([broken, ghm()], ("float32", "12 bytes"))
    assert beside["verdict"] == FAILS
    assert "1 failed" in beside["where"]
    for line in table([alone, beside]).splitlines()[2:]:
        assert line.count("|") == 6  # a table still
    # Where a peer failed or could not be measured, nothing is claimed over it.
    without = ghm()
    del without["ratios"]["bce compiled"]
    assert verdict([without], ("float32", "ready made"))["verdict"] == ABSENT
    assert verdict([ghm(peak_ratio=None)], ("GHM-C, 2^23",))["verdict"] == ABSENT


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["claims", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        claims.main()
    return stopped.value.code


def test_the_command(tmp_path, monkeypatch, capsys):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    losses = write("losses.jsonl", ghm(source="new"), ghm(dtype="bfloat16", source="new"))
    steps = write("step.jsonl", step(1.01, source="new"))
    out = tmp_path / "claims.jsonl"
    assert run(monkeypatch, losses, steps, "--device", "cuda", "--out", out) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [each for each in verdicts if "CPU" in each["claim"]]
    assert [each["verdict"] for each in verdicts].count(HOLDS) == 10
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert "| holds | 0.86 | 0.85 | GHM-C, float32" in printed

    assert run(monkeypatch, write("bad.jsonl", step(1.5)), losses) == 1
    assert "| FAILS | 1.5 | 1.02 | RetinaNet-R50" in re.sub(" +", " ", capsys.readouterr().out)
    # Rows of older code in the same file are history.
    stale = write("stale.jsonl", ghm(entries=2**25, share_of_copy=0.1, source="old"), ghm())
    assert run(monkeypatch, stale) == 0
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "empty")
    assert run(monkeypatch) == 0  # nothing recorded, nothing failed
    assert "not measured" in capsys.readouterr().out


def test_judging_does_not_load_torch():
    look = "import sys, benchmarks.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT).returncode == 0
