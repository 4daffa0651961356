import subprocess
import sys

import pytest
from PIL import Image

from ghm_triton.detection.data import DATASETS, open_dataset
from ghm_triton.detection.data.coco import COCODataset
from ghm_triton.detection.data.digits import DigitScenes
from ghm_triton.detection.data.registry import _DIGITS_OPTIONS, _KINDS
from ghm_triton.detection.data.voc import VOCDataset


def test_digits_by_default():
    for split, images in {"train": 4000, "val": 400, "test": 400}.items():
        dataset = open_dataset("digits", split)
        assert isinstance(dataset, DigitScenes)
        assert (dataset.name, dataset.split, len(dataset)) == ("digits", split, images)
        assert dataset[0].image.size == (128, 128)


def test_digits_with_options():
    spec = "digits:noise=0.5,images=20,held_out_images=10,imbalance=3,size=96x100,seed=7"
    opened = open_dataset(spec, "train")
    same = DigitScenes("train", images=20, noise=0.5, imbalance=3.0, size=(96, 100), seed=7)
    assert len(opened) == 20
    assert opened[3].image.size == (100, 96)
    assert opened[3].image.tobytes() == same[3].image.tobytes()
    assert [opened[i].labels.tolist() for i in range(20)] == [
        same[i].labels.tolist() for i in range(20)
    ]
    assert len(open_dataset(spec, "test")) == 10


def test_one_number_is_a_square():
    assert open_dataset("digits:size=96", "val")[0].image.size == (96, 96)


def test_keywords_override_the_spec_and_the_spec_the_seed():
    assert len(open_dataset("digits:images=20", "train", images=30)) == 30
    by_spec = open_dataset("digits:seed=7", "train", seed=1)
    assert by_spec[0].image.tobytes() == DigitScenes("train", seed=7)[0].image.tobytes()
    by_keyword = open_dataset("digits", "train", seed=1)
    assert by_keyword[0].image.tobytes() == DigitScenes("train", seed=1)[0].image.tobytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", "unknown data set 'imagenet'.*digits, voc, coco"),
        ("", "unknown data set ''"),
        ("digits:nose=1", "unknown option 'nose'; known: images, held_out_images"),
        ("digits:noise", "key=value, got 'noise'"),
        ("digits:noise=much", "'much' is not a value for 'noise'"),
        ("digits:size=96x", "'96x' is not a value for 'size'"),
        ("digits:noise=1,noise=1", "'noise' is given twice"),
        ("digits:noise=2", "noise must be in"),
        ("voc", "voc: expected a folder"),
        ("coco:", "coco: expected a folder"),
        ("voc:nowhere", "no folder at 'nowhere'"),
    ],
)
def test_bad_specs_name_the_bad_part(spec, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(spec, "train")


def test_bad_keywords():
    with pytest.raises(ValueError, match="unknown option 'nose'"):
        open_dataset("digits", "train", nose=1)
    with pytest.raises(ValueError, match="unknown option noise; known: verify_images"):
        open_dataset("voc:nowhere", "train", noise=1)
    with pytest.raises(ValueError, match=r"on_damage.*'stop'"):
        open_dataset("digits", "train", on_damage="stop")


def test_digits_take_only_their_own_classes():
    assert open_dataset("digits", "val", class_names=list("0123456789")).class_names[9] == "9"
    with pytest.raises(ValueError, match="not cat, dog"):
        open_dataset("digits", "val", class_names=["cat", "dog"])


def test_folders_may_hold_colons_commas_and_equals_signs(tmp_path):
    root = tmp_path / "a:b,c=d"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main", "annotations"):
        (root / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(root / "JPEGImages" / "i.png")
    (root / "Annotations" / "i.xml").write_text("<annotation/>")
    (root / "ImageSets" / "Main" / "train.txt").write_text("i\n")
    (root / "annotations" / "train.json").write_text(
        '{"images": [{"id": 1, "file_name": "JPEGImages/i.png"}], "annotations": [],'
        ' "categories": [{"id": 1, "name": "cat"}]}'
    )
    voc = open_dataset(f"voc:{root}", "train", class_names=["cat"], verify_images=False)
    coco = open_dataset(f"coco:{root}", "train", on_damage="refuse")
    assert isinstance(voc, VOCDataset)
    assert isinstance(coco, COCODataset)
    assert (len(voc), len(coco), coco.class_names) == (1, 1, ("cat",))


def test_the_help_names_every_kind_and_option():
    for word in (*_KINDS, *_DIGITS_OPTIONS):
        assert word in DATASETS


def test_importing_the_data_sets_does_not_import_scikit_learn():
    """It takes a second, and only digits need it."""
    code = "import sys, ghm_triton.detection.data; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sources_are_those_of_the_samples():
    scenes = open_dataset("digits:held_out_images=5", "val")
    assert scenes.sources() == {scenes[i].source for i in range(5)}
