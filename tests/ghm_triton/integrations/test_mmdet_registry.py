"""How ours take the place of MMDetection's, in a package of its shape with mmengine's registry.

MMDetection itself needs compiled operators that are not on the package index.
"""

import importlib
import sys

import pytest
from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

MODULE = "ghm_triton.integrations.mmdet"
NAMES = ("GHMC", "GHMR")
THEIRS = """
from torch import nn
from {registry} import {name}

@{name}.register_module()
class GHMC(nn.Module): ...

@{name}.register_module()
class GHMR(nn.Module): ...
"""
REGISTRY = """
from mmengine.registry import Registry
{name} = Registry("model", scope="mmdet")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out an `mmdet` from its files, and forget it and our module afterwards."""

    def forget():
        for name in [*sys.modules]:
            if name == MODULE or name.split(".")[0] == "mmdet":
                monkeypatch.delitem(sys.modules, name)

    def lay_out(files):
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "mmdet" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    forget()
    yield lay_out
    forget()


def third_generation():
    return {
        "registry.py": REGISTRY.format(name="MODELS"),
        "models/__init__.py": "",
        "models/losses/__init__.py": THEIRS.format(registry="mmdet.registry", name="MODELS"),
    }


def second_generation():
    return {
        "models/__init__.py": "",
        "models/builder.py": REGISTRY.format(name="LOSSES"),
        "models/losses/__init__.py": THEIRS.format(registry="mmdet.models.builder", name="LOSSES"),
    }


@pytest.mark.parametrize(
    ("files", "home", "name"),
    [
        (third_generation(), "mmdet.registry", "MODELS"),
        (second_generation(), "mmdet.models.builder", "LOSSES"),
    ],
    ids=["3.x", "2.x"],
)
@pytest.mark.parametrize("models_first", [False, True])
def test_a_configuration_gets_ours(install, files, home, name, models_first):
    install(files)
    if models_first:
        importlib.import_module("mmdet.models.losses")
    config = Config({"custom_imports": {"imports": [MODULE]}})
    ours = import_modules_from_strings(**config.custom_imports)[0]
    # As a training script does afterwards; theirs would raise if ours were there first.
    importlib.import_module("mmdet.models.losses")
    registry = getattr(importlib.import_module(home), name)
    for loss in NAMES:
        assert registry.get(loss) is getattr(ours, loss)
        built = registry.build({"type": loss, "bins": 7, "momentum": 0.5, "loss_weight": 3.0})
        assert isinstance(built, getattr(ours, loss))
        assert (built.density.bins, built.density.momentum, built.loss_weight) == (7, 0.5, 3.0)
    assert ours.register() is True  # again does no harm
    assert registry.get("GHMC") is ours.GHMC


def test_without_mmdetection_nothing_is_registered(install):
    ours = importlib.import_module(MODULE)
    assert ours.register() is False


@pytest.mark.parametrize(
    ("broken", "missing"),
    [("models/losses/__init__.py", "mmcv.ops"), ("registry.py", "mmengine_of_tomorrow")],
)
def test_a_broken_mmdetection_says_so(install, broken, missing):
    # Silence would leave the user with MMDetection's own loss.
    install({**third_generation(), broken: f"import {missing}"})
    with pytest.raises(ModuleNotFoundError, match=missing.split(".")[0]):
        importlib.import_module(MODULE)
