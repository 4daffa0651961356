"""The parsers refuse what is malformed, and do nothing else; kept cases end as they are named."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_service import CORPUS, TARGETS
from service.core.errors import ProblemError

CASES = sorted((CORPUS / "v2" / "corpus").iterdir())


def target_of(name: str) -> str:
    return next(target for target in ("infer-uint8", "infer", "inflate") if name.startswith(target))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_kept_cases_end_as_their_names_say(path):
    target = target_of(path.name)
    expected = int(path.name.removeprefix(target).split("-")[1])
    try:
        TARGETS[target].run(path.read_bytes())
        status = 200
    except ProblemError as error:
        status = error.status
    assert status == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infer", "infer-uint8", "inflate"])
@settings(max_examples=700, deadline=None)
@given(st.integers(0, 2**64))
def test_mutated_cases_are_accepted_or_refused(name, seed):
    target, chance = TARGETS[name], random.Random(seed)
    cases = target.cases()
    target.outcome(target.mutate(chance.choice(cases), chance, cases))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused(name, case):
    TARGETS[name].outcome(case)
