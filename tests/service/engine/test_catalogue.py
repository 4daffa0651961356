import pytest

from service.engine.catalogue import Listed, Signature, list_models, version_key


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
    assert list_models(path) == ([Listed(path, None, "1")], {})


def test_every_layout_and_nothing_else(folder):
    ignored = (".b.onnx", "c.onnx.tmp", "README", ".d/1.onnx", "e/.1.onnx", "e/x.txt", "f/2/x.onnx")
    root = folder("pets.onnx", "cars/3.onnx", "cars/10.onnx", "signs/2/model.onnx", *ignored)
    expected = [
        Listed(root / "cars/3.onnx", "cars", "3"),
        Listed(root / "cars/10.onnx", "cars", "10"),
        Listed(root / "pets.onnx", "pets", "1"),
        Listed(root / "signs/2/model.onnx", "signs", "2"),
    ]
    assert list_models(root) == (expected, {})


def test_the_second_file_of_a_version_is_a_problem(folder):
    root = folder("pets.onnx", "pets/1.onnx")
    listed, problems = list_models(root)
    assert listed == [Listed(root / "pets/1.onnx", "pets", "1")]
    reason = f"{root / 'pets/1.onnx'} is version 1 of pets already"
    assert problems == {root / "pets.onnx": reason}


@pytest.mark.parametrize("name", ["good (1).onnx", "ü.onnx", "a" * 129 + ".onnx", "x/v?.onnx"])
def test_a_name_that_a_url_cannot_carry_is_skipped(folder, name):
    root = folder("good.onnx", name)
    models, problems = list_models(root)
    assert [model.name for model in models] == ["good"]
    assert list(problems) == [root / name]
    assert "is no name for a model" in problems[root / name]


@pytest.mark.parametrize("call", ["iterdir", "stat"])
def test_an_entry_that_cannot_be_read_is_skipped(folder, monkeypatch, call):
    root = folder("good.onnx", "lost+found/x.onnx")
    real = getattr(type(root), call)

    def read(path, *arguments, **options):  # as without permission; the tests may run as root
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(type(root), call, read)
    models, problems = list_models(root)
    assert [model.name for model in models] == ["good"]
    assert problems == {root / "lost+found": "Permission denied"}


def test_versions_are_ordered_by_number():
    versions = ["v10", "v9", "1.10", "1.9", "2", "10", "1"]
    assert sorted(versions, key=version_key) == ["1", "1.9", "1.10", "2", "10", "v9", "v10"]


def test_a_signature_changes_with_the_file(tmp_path):
    path = tmp_path / "a.onnx"
    assert Signature.of(path) is None
    path.write_bytes(b"one")
    first = Signature.of(path)
    assert first == Signature.of(path)
    path.write_bytes(b"longer")
    second = Signature.of(path)
    assert second != first
    path.chmod(0o600)
    assert Signature.of(path) != second
