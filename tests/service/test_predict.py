import json

import pytest
from PIL import Image

from ghm_triton import cli


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
    assert ours == {"source": str(photo), "image": theirs["image"], **without_model(theirs)}
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


def without_model(answer: dict[str, object]) -> dict[str, object]:
    return {"detections": answer["detections"]}


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "7"], "threshold is '7'"),
        (["--classes", "violet"], "unknown class 'violet'"),
        (["--max-detections", "0"], "max_detections is '0'"),
    ],
)
def test_a_wrong_option_is_one_sentence(flags, message, detector, photo, capsys):
    assert predict(detector, photo, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_not_an_image_or_not_a_detector_is_named(detector, photo, tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    assert predict(detector, text) == 2
    assert f"{text}: " in capsys.readouterr().err
    assert predict(photo, photo) == 2
    assert str(photo) in capsys.readouterr().err
    assert predict(detector, tmp_path / "none.png") == 2
    assert "none.png" in capsys.readouterr().err
