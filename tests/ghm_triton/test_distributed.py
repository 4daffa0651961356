"""Ranks with a share of the batch each are one process with all of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks.py")
SPEC = importlib.util.spec_from_file_location("ranks", SCRIPT)
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)

POISONED = ["index", "streaming", "none", "regression", "softmax"]
SHARES = [
    *(f"steps:{name}" for name in ranks.LOSSES),
    *(f"poisoned:{name} by {value}" for name in POISONED for value in ranks.POISON),
]
MODELS = ["ddp inside", "ddp outside", "fsdp"]
JOBS = {
    ("torch", 2): [
        *SHARES,
        *MODELS,
        *("ddp without a group", "fsdp mixed", "fsdp checkpoint", "large counts", "copied"),
    ],
    ("torch", 4): [*SHARES, *MODELS, "two groups"],
    # The kernels differ in what is counted, not in how it is shared. Their interpreter is slow.
    ("triton", 2): [
        *(f"steps:{name}" for name in ("index positives", "streaming", "regression", "softmax")),
        *(f"poisoned:{name} by nan" for name in ("index", "regression")),
    ],
}
# What another order of adding costs in float32, and the last entries of a rank's rows, which a
# vector unit and the scalar code round apart. The weights are the same to the bit.
ROUNDING = {"rtol": 1e-6, "atol": 0.0}
# The same in float64, over a few steps of training.
ROUNDING64 = {"rtol": 1e-11, "atol": 1e-13}


def jobs_of(kind):
    """For a test of each job of a kind, with either number of processes."""
    return pytest.mark.parametrize(
        ("size", "name"),
        [
            (size, name)
            for (backend, size), names in JOBS.items()
            for name in names
            if backend == "torch" and name.startswith(kind)
        ],
    )


@pytest.fixture(scope="module")
def processes(tmp_path_factory, device):
    """Start ranks once for each size and backend, and read what each found in a job."""
    started = {}

    def results(size, name, backend="torch"):
        key = size, backend
        if key not in started:
            try:
                started[key] = run(tmp_path_factory.mktemp("ranks"), size, backend, device)
            except subprocess.SubprocessError as error:  # once, and not for every job anew
                started[key] = str(error)
        if isinstance(started[key], str):
            pytest.fail(f"{size} ranks with {backend}: {started[key]}", pytrace=False)
        found = [rank[name] for rank in started[key]]
        for rank, result in enumerate(found):
            if isinstance(result, str):
                pytest.fail(f"rank {rank} of {size} failed in {name!r}:\n{result}", pytrace=False)
        return found

    return results


def run(folder, size, backend, device):
    where = str(device) if backend == "triton" else "cpu"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), str(folder), str(size), where, backend]
    command += JOBS[backend, size]
    subprocess.run(command, env=environment, check=True, timeout=200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@jobs_of("steps")
def test_ranks_are_one_process_with_the_whole_batch(processes, size, name):
    """Shares of equal rows, of unequal rows, of no rows: loss, gradient and state at each step."""
    check_steps(processes(size, name), name)


@jobs_of("poisoned")
def test_a_bad_value_on_one_rank_is_seen_by_all(processes, size, name):
    """Rank 0 has no rows at all in that step, and its loss is NaN like the others'."""
    check_poisoned(processes(size, name), name)


@pytest.mark.kernels
@pytest.mark.usefixtures("kernels_run")
def test_kernels_share_as_well(processes, device):
    for name in JOBS["triton", 2]:
        found = processes(2, name, "triton")
        if name.startswith("steps"):
            check_steps(found, name, "triton", str(device))
        else:
            check_poisoned(found, name)


def check_steps(by_rank, name, backend="torch", device="cpu"):
    size, name = len(by_rank), name.removeprefix("steps:")
    options = ranks.LOSSES[name][2]
    whole = ranks.several_steps(name, None, 0, 1, backend, device)
    for n, truth in enumerate(whole):
        steps = [found[n] for found in by_rank]
        # What averages over ranks gives a mean; a sum and entries are the rank's own.
        each = size if options.get("reduction", "mean") == "mean" else 1
        losses = [step["loss"] for step in steps]
        loss = torch.cat(losses) if options.get("reduction") == "none" else sum(losses) / each
        slope = torch.cat([step["slope"] for step in steps]) / each
        torch.testing.assert_close(loss, truth["loss"], **ROUNDING, msg=said(name, n))
        torch.testing.assert_close(slope, truth["slope"], **ROUNDING, msg=said(name, n))
        for rank, step in enumerate(steps):
            assert torch.equal(step["smoothed"], truth["smoothed"]), (name, n, rank)
            assert int(step["updates"]) == n + 1, (name, n, rank)


def said(name, n):
    """What goes before the message of a comparison."""
    return lambda message: f"{name}, step {n}: {message}"


def check_poisoned(by_rank, name):
    for rank, (good, bad, after) in enumerate(by_rank):
        where = f"{name}, rank {rank}"
        assert good["loss"].isfinite().all(), where
        assert bad["loss"].isnan().all(), where
        assert torch.equal(bad["smoothed"], good["smoothed"]), where
        assert [int(step["updates"]) for step in (good, bad, after)] == [1, 1, 2], where
        # The same batch again: its average is what it was, and so are its losses, to rounding.
        torch.testing.assert_close(after["loss"], good["loss"], **ROUNDING)
    assert by_rank[0][1]["slope"].shape == (0, ranks.CLASSES)
    assert by_rank[-1][1]["slope"].isnan().any()


def test_only_ranks_of_the_group_share(processes):
    found = processes(4, "two groups")
    for half, members in enumerate((found[:2], found[2:])):
        truth = ranks.call(ranks.build("index", None, "torch"), ranks.batch("index", half), "cpu")
        for (step,) in members:
            assert torch.equal(step["smoothed"], truth["smoothed"])
        loss = sum(step["loss"] for (step,) in members) / 2
        torch.testing.assert_close(loss, truth["loss"], **ROUNDING)


@pytest.fixture(scope="module")
def alone():
    return ranks.alone()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_training_a_model_is_that_of_one_process(processes, alone, size, name):
    found = processes(size, name)
    for rank in found:
        for ours, truth in zip(rank["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(ours, truth, **ROUNDING64)
        for ours, truth in zip(rank["state"], alone["state"], strict=True):
            assert torch.equal(ours, truth)
    losses = torch.stack([torch.stack(rank["losses"]) for rank in found]).mean(0)
    torch.testing.assert_close(losses, torch.stack(alone["losses"]), **ROUNDING64)


def test_without_a_group_ddp_hands_out_the_average_of_rank_0(processes):
    own, handed_out = zip(*processes(2, "ddp without a group"), strict=True)
    assert not torch.equal(own[0][0], own[-1][0])
    for state in handed_out:
        assert all(map(torch.equal, state, own[0]))


def test_counts_beyond_float32_are_added_exactly(processes):
    for found in processes(2, "large counts"):
        assert found == [2 * 2**40 + 1, 1, 1.5, 1]


def test_mixed_precision_leaves_the_counts_in_float32(processes):
    by_rank = processes(2, "fsdp mixed")
    for smoothed, updates, *_ in by_rank:
        assert (smoothed.dtype, int(updates)) == (torch.float32, 1)
        labels = ranks.scenes(0)[1]
        # Above 256 not every number is one in bfloat16.
        assert float(smoothed.sum()) == 0.25 * ranks.CLASSES * int((labels >= 0).sum())
        assert (smoothed != smoothed.bfloat16()).any()
    for state in by_rank:
        assert all(map(torch.equal, state, by_rank[0]))


def test_sharded_checkpoints_bring_the_average_back(processes):
    for kept, from_full, from_files in processes(2, "fsdp checkpoint"):
        assert kept == from_full
        assert kept == from_files


def test_a_copy_shares_the_group(processes):
    for losses, same_group in processes(2, "copied"):
        assert losses[0] == losses[1]
        assert same_group
