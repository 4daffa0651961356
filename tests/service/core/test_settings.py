import os
from pathlib import Path

import pytest

from service.core.settings import (
    Settings,
    SettingsError,
    available_cpus,
    load_settings,
    unknown_variables,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GHM_{name.upper()}", raising=False)
    monkeypatch.delenv("GHM_PROVIDERS", raising=False)


def test_defaults():
    settings = load_settings(model="m.onnx")
    assert settings == Settings(
        model=Path("m.onnx"),
        host="127.0.0.1",
        port=8000,
        threads=available_cpus(),
        provider="auto",
        max_upload_bytes=20 * 2**20,
        max_pixels=40_000_000,
        max_images=16,
        log_level="info",
    )


def test_environment_sets_and_an_argument_wins(monkeypatch):
    monkeypatch.setenv("GHM_MODEL", "env.onnx")
    monkeypatch.setenv("GHM_PORT", "1234")
    monkeypatch.setenv("GHM_THREADS", "3")
    settings = load_settings(port=99, threads=None)
    assert (settings.model, settings.port, settings.threads) == (Path("env.onnx"), 99, 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GHM_PROVIDER", "tpu", "GHM_PROVIDER is 'tpu'.*'auto', 'cpu' or 'cuda'"),
        ("GHM_PORT", "65536", "GHM_PORT is '65536'"),
        ("GHM_THREADS", "0", "GHM_THREADS is '0'"),
        ("GHM_THREADS", "many", "GHM_THREADS is 'many'"),
        ("GHM_MAX_UPLOAD_BYTES", "20MB", "GHM_MAX_UPLOAD_BYTES is '20MB'"),
        ("GHM_MAX_PIXELS", "1000000000", "GHM_MAX_PIXELS is '1000000000'.*178956970"),
        ("GHM_MAX_IMAGES", "-1", "GHM_MAX_IMAGES is '-1'"),
        ("GHM_LOG_LEVEL", "loud", "GHM_LOG_LEVEL is 'loud'"),
    ],
)
def test_a_value_that_cannot_be_is_named(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        load_settings(model="m.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "m.onnx", "port": 70000}, r"^port is 70000"),
        ({"model": "m.onnx", "trusted_proxies": "10.0.0.1, *"}, r"trusted_proxies .*'\*'"),
        ({}, "neither GHM_MODEL nor GHM_MODELS is set"),
        ({"model": "m.onnx", "models": "folder"}, r"both a model \(m.onnx\) and a folder"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(**arguments)


def test_an_empty_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("GHM_PORT", "")
    assert load_settings(model="m.onnx").port == 8000


def test_a_source_that_is_given_wins_over_both_of_the_environment(monkeypatch):
    monkeypatch.setenv("GHM_MODEL", "env.onnx")
    settings = load_settings(models="folder")
    assert (settings.model, settings.models, settings.source) == (None, *[Path("folder")] * 2)


def test_no_secret_is_shown():
    assert "hush" not in repr(load_settings(model="m.onnx", tokens="anna:hush"))


def test_workers_share_the_processors(monkeypatch):
    threads = load_settings(model="m.onnx", workers=2).threads
    assert threads == max(1, available_cpus() // 2)
    assert load_settings(model="m.onnx", workers=2, threads=5).threads == 5
    assert load_settings(model="m.onnx", workers=2).inferences == min(threads, 4)
    assert load_settings(model="m.onnx", workers=2, inferences=3).inferences == 3
    monkeypatch.setenv("GHM_THREADS", "7")
    assert load_settings(model="m.onnx", workers=2).threads == 7


def test_the_provider_by_its_other_name(monkeypatch):
    monkeypatch.setenv("GHM_PROVIDERS", "cuda")
    assert load_settings(model="m.onnx").provider == "cuda"
    assert load_settings(model="m.onnx", provider="cpu").provider == "cpu"
    monkeypatch.setenv("GHM_PROVIDER", "cpu")
    assert load_settings(model="m.onnx").provider == "cpu"


def test_variables_that_are_no_settings_are_named(monkeypatch):
    monkeypatch.setenv("GHM_QUEUE", "5")
    monkeypatch.setenv("GHM_PROVIDERS", "cpu")
    monkeypatch.setenv("GHM_PORT", "1")
    assert unknown_variables() == ["GHM_QUEUE"]


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),  # rounded down
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # but never to none
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),  # more than can be scheduled on
        ("0::/docker/0123\n", {"cpu.max": "200000 100000\n"}, 2),  # named as the host sees it
        (  # the tightest of the groups around it
            "0::/a/b\n",
            {"cpu.max": "700000 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"},
            2,
        ),
        (  # version 1
            "4:memory:/y\n3:cpu,cpuacct:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            8,
        ),
    ],
)
def test_processors_within_the_quota_of_the_control_groups(
    tmp_path, monkeypatch, membership, files, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_cpus(tmp_path / "cgroup", tmp_path / "membership") == expected


def test_processors_of_this_machine():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
