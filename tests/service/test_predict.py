import json

import pytest
from PIL import Image

from ghm_triton import cli
from service.app import create_app
from service.core.settings import Settings


def predict(*words: object) -> int:
    return cli.main(["predict", *map(str, words)])


@pytest.fixture
def photo(png, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png)
    return path


@pytest.mark.parametrize(
    "options", [{}, {"threshold": "0.2"}, {"thresholds": '{"red": 0.1}', "classes": "red,blue"}]
)
def test_predict_answers_what_the_service_answers(options, detector, photo, client, capsys):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert predict(detector, photo, "--json", *flags) == 0
    ours = json.loads(capsys.readouterr().out)
    theirs = client.post("/v1/detect", content=photo.read_bytes(), params=options).json()
    assert ours == {"source": str(photo), **{key: theirs[key] for key in ("image", "detections")}}
    assert ours["detections"]


def test_predict_takes_either_variant(detector, uint8_detector, photo, capsys):
    answers = []
    for path in (detector, uint8_detector):
        assert predict(path, photo, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    ours, theirs = (
        [(found["class"], found["box"]) for found in one["detections"]] for one in answers
    )
    assert ours == theirs
    assert len(ours) == 3


def test_each_line_shows_score_and_threshold(detector, photo, capsys):
    assert predict(detector, photo, photo) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{photo}: ") == 2
    assert " >= 0." in printed


def test_drawings_are_written(detector, photo, tmp_path, capsys):
    assert predict(detector, photo, "--out", tmp_path / "drawn") == 0
    with Image.open(tmp_path / "drawn" / "photo.png") as drawn, Image.open(photo) as plain:
        assert drawn.width % plain.width == 0
        assert drawn.resize(plain.size).tobytes() != plain.convert("RGB").tobytes()


@pytest.mark.parametrize("by_service", [False, True], ids=["file", "service"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "7"], "threshold is '7'"),
        (["--classes", "violet"], "unknown class 'violet'"),
        (["--max-detections", "0"], "max_detections is '0'"),
        (["--thresholds", "{"], "thresholds is '{'"),
        (["--thresholds", "[1]"], "[1]"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    flags, message, by_service, detector, photo, live_service, capsys
):
    source = ["--url", live_service] if by_service else [detector]
    assert predict(*source, photo, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    if by_service and "--thresholds" not in flags:  # JSON is parsed before an image is sent
        assert f"{photo}: " in error


def test_what_is_not_an_image_or_not_a_detector_is_named(detector, photo, tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    assert predict(detector, text) == 2
    assert f"{text}: " in capsys.readouterr().err
    assert predict(photo, photo) == 2
    assert str(photo) in capsys.readouterr().err
    assert predict(detector, tmp_path / "none.png") == 2
    assert "none.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--json"],
        ["--json", "--threshold", "0.2", "--iou", "0.1", "--max-detections", "4"],
        ["--json", "--thresholds", '{"red": 0.1}', "--classes", "red,blue"],
        ["--out", "drawn"],
    ],
)
def test_a_service_answers_the_same(flags, detector, photo, live_service, monkeypatch, capsys):
    monkeypatch.chdir(photo.parent)
    drawn = photo.parent / "drawn" / "photo.png"
    assert predict(detector, photo, photo, *flags) == 0
    ours = capsys.readouterr().out
    picture = drawn.read_bytes() if drawn.exists() else None
    drawn.unlink(missing_ok=True)
    assert predict("--url", live_service, photo, photo, *flags) == 0
    assert capsys.readouterr().out == ours
    assert (drawn.read_bytes() if drawn.exists() else None) == picture
    assert (picture is None) == ("--out" not in flags)


def test_names_may_stand_around_the_flags(detector, photo, live_service, capsys):
    for words in (
        ["--url", live_service, photo],
        [photo, "--url", live_service],
        ["--json", detector, photo],
        [detector, "--json", photo],
        [detector, photo, "--json"],
    ):
        assert predict(*words) == 0
        assert capsys.readouterr().out.count("photo.png") == 1


def test_a_service_that_asks_for_a_token(serve, settings, model, photo, monkeypatch, capsys):
    monkeypatch.delenv("GHM_TOKEN", raising=False)
    guarded = settings.model_copy(update={"tokens": Settings(tokens="secret").tokens})
    with serve(create_app(guarded, model)) as url:
        assert predict("--url", url, photo) == 2
        assert predict("--url", url, photo, "--token", "wrong") == 2
        assert predict("--url", url, photo, "--token", "secret") == 0
        monkeypatch.setenv("GHM_TOKEN", "secret")
        assert predict("--url", url, photo) == 0
        assert predict("--url", url, photo, "--token", "wrong") == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_what_is_missing_is_said(detector, photo, capsys):
    assert predict(detector) == 2
    assert "no image is named" in capsys.readouterr().err
    assert predict("--url", "localhost:8000", photo) == 2
    assert "'localhost:8000'" in capsys.readouterr().err
    assert predict("--url", "http://127.0.0.1:1", photo) == 2
    assert "does not answer" in capsys.readouterr().err
