from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.study.report.__main__ import main
from benchmarks.study.report.events import write_events
from benchmarks.study.report.runs import read_study


def test_the_command_prints_the_methods_and_writes_the_report(write, make, tmp_path, capsys):
    failed = {**make("asdn"), "error": "no"}
    path = write(make("ghm", ap=0.6), make("focal", ap=0.4), make("ce"), failed, '{"', end="")
    assert main([str(path), "--out", str(tmp_path / "out"), "--baseline", "ce"]) == 0
    out, err = capsys.readouterr()
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert "AP against ce" in table[0]
    assert [line.split()[1] for line in table[2:]] == ["ce", "ghm", "focal"]
    assert f"report: {tmp_path / 'out' / 'report.md'}, with 2 figures" in out
    assert (tmp_path / "out" / "report.md").exists()
    assert f"the unfinished last line of {path} was dropped" in err
    assert "1 runs failed" in err


def test_several_files_and_sections(write, make, tmp_path, capsys):
    first = write(make("focal", 0, 0.4), make("focal", section="bins"), name="a.jsonl")
    second = write(make("focal", 1, 0.6), name="b.jsonl")
    words = [str(first), str(second), "--out", str(tmp_path / "out")]
    words += ["--tensorboard", str(tmp_path / "events")]
    assert main([*words, "--section", "methods"]) == 0
    out = capsys.readouterr().out
    assert "0.500 ± 0.141" in out
    assert "bins" not in out
    assert f"event files: {tmp_path / 'events'}, curves of 0 runs" in out


def test_a_section_without_baseline_is_compared_with_another_sections(
    write, make, tmp_path, capsys
):
    rows = [make("focal", ap=0.4), make("ghm", ap=0.5, bins=30)]
    rows += [make("bins-5", ap=0.6, section="bins", bins=5, options={"bins": 5})]
    rows += [make("s0", section="strength", strength=0.5)]
    failed = {**make("asdn"), "error": "no"}
    words = [str(write(*rows, failed)), "--out", str(tmp_path / "out"), "--section", "bins"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "+0.200" in out
    assert "focal is that of section methods" in out
    assert "| ghm" not in out
    assert "with 2 figures" in out
    assert err == ""
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1 trainings" in text
    assert "methods:" not in text
    assert "AP against strength" not in text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "ap_against_bins.png",
        "initial_loss.png",
    ]


def test_loss_curves_become_event_files(write, make, tmp_path):
    curves = {"step": [10, 20], "bbox_regression": [0.5, None]}
    path = write(make("ghm", 1, curves=curves), make("ce"))
    assert write_events(read_study([path]), tmp_path / "events") == 1
    (folder,) = (tmp_path / "events" / "methods").glob("*/ghm/seed_1")
    (event,) = EventAccumulator(str(folder)).Reload().Scalars("loss/bbox_regression")
    assert (event.step, event.value) == (10, 0.5)


def test_what_cannot_be_reported_is_one_line(write, make, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "none.jsonl"), *words]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert main([str(write(make(), "{")), *words]) == 2
    assert "study.jsonl, line 2 is damaged" in capsys.readouterr().err
