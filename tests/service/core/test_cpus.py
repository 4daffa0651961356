import os

import pytest

from service.core import cpus


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes control groups into a folder; answers with what `available_cpus` makes of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def available(membership: str, files: dict[str, str]) -> int:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return cpus.available_cpus(tmp_path / "cgroup", tmp_path / "membership")

    return available


def test_without_control_groups_all_that_can_be_scheduled_on(groups):
    assert groups("", {}) == 8


def test_version_2_quota(groups):
    assert groups("0::/\n", {"cpu.max": "300000 100000\n"}) == 3


def test_version_2_without_a_quota(groups):
    assert groups("0::/\n", {"cpu.max": "max 100000\n"}) == 8


def test_a_part_of_a_processor_is_rounded_down_but_never_to_none(groups):
    assert groups("0::/\n", {"cpu.max": "250000 100000\n"}) == 2
    assert groups("0::/\n", {"cpu.max": "50000 100000\n"}) == 1


def test_the_tightest_group_around_this_one_counts(groups):
    files = {"cpu.max": "700000 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}
    assert groups("0::/a/b\n", files) == 2


def test_a_group_named_as_the_host_sees_it(groups):
    assert groups("0::/docker/0123\n", {"cpu.max": "200000 100000\n"}) == 2


def test_version_1_quota(groups):
    files = {"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}
    assert groups("4:memory:/y\n3:cpu,cpuacct:/x\n0::/\n", files) == 4


def test_version_1_without_a_quota(groups):
    files = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert groups("1:cpu:/\n", files) == 8


def test_a_quota_above_the_processors_is_no_gift(groups):
    assert groups("0::/\n", {"cpu.max": "6400000 100000\n"}) == 8


def test_this_machine():
    assert 1 <= cpus.available_cpus() <= (os.cpu_count() or 1)
