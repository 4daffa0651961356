import pytest

from service.engine.catalogue import CatalogueError, Listed, Signature, list_models, version_key


@pytest.fixture
def folder(tmp_path):
    """Makes empty files; returns the folder."""

    def make(*names: str):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def test_a_single_file_leaves_its_name_to_its_card(tmp_path):
    path = tmp_path / "pets.onnx"
    assert list_models(path) == [Listed(path, None, "1")]


def test_every_layout(folder):
    root = folder("pets.onnx", "cars/3.onnx", "cars/10.onnx", "signs/2/model.onnx")
    assert list_models(root) == [
        Listed(root / "cars/3.onnx", "cars", "3"),
        Listed(root / "cars/10.onnx", "cars", "10"),
        Listed(root / "pets.onnx", "pets", "1"),
        Listed(root / "signs/2/model.onnx", "signs", "2"),
    ]


def test_what_is_no_model_is_left_alone(folder):
    root = folder("a.onnx", ".b.onnx", "c.onnx.tmp", "README", ".d/1.onnx", "e/.1.onnx", "e/x.txt")
    assert [one.name for one in list_models(root)] == ["a"]


def test_two_files_of_one_version_are_refused(folder):
    with pytest.raises(CatalogueError, match=r"are both version 1 of pets"):
        list_models(folder("pets.onnx", "pets/1.onnx"))


@pytest.mark.parametrize("name", ["hot dog!.onnx", "ü.onnx", "a" * 129 + ".onnx", "x/v?.onnx"])
def test_a_name_that_an_address_cannot_carry_is_refused(folder, name):
    with pytest.raises(CatalogueError, match="is no name for a model"):
        list_models(folder(name))


def test_versions_order_as_people_do():
    versions = ["v10", "v9", "1.10", "1.9", "2", "10", "1"]
    assert sorted(versions, key=version_key) == ["1", "1.9", "1.10", "2", "10", "v9", "v10"]


def test_a_signature_changes_with_the_file(tmp_path):
    path = tmp_path / "a.onnx"
    assert Signature.of(path) is None
    path.write_bytes(b"one")
    first = Signature.of(path)
    assert first == Signature.of(path)
    path.write_bytes(b"longer")
    assert Signature.of(path) != first
