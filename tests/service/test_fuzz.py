"""The parsers of bodies and images refuse what is malformed; kept cases end as they are named."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_service import CORPUS, TARGETS
from service.core.errors import ProblemError

BODIES = sorted(path for path in (CORPUS / "corpus").iterdir() if not path.name[0].isdigit())


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path.name)
def test_kept_bodies_end_as_their_names_say(path):
    target, status, *_ = path.name.split("-")
    try:
        TARGETS[target].run(path.read_bytes())
        ended = 200
    except ProblemError as error:
        ended = error.status
    assert ended == int(status)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "form", "json"])
@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**64))
def test_mutated_cases_are_accepted_or_refused(name, seed):
    target, chance = TARGETS[name], random.Random(seed)
    cases = target.cases()
    assert cases
    target.outcome(target.mutate(chance.choice(cases), chance, cases))
