"""Requests of the Open Inference Protocol, as bytes."""

import orjson
import pytest

from service.problems import ProblemError
from service.v2.signature import Signature


@pytest.fixture(scope="session")
def signature(card) -> Signature:
    return Signature.of(card)


@pytest.fixture(scope="session")
def frame():
    """Puts JSON and the bytes of tensors together; returns the body and the header's value."""

    def put(asked: dict, *tensors: bytes) -> tuple[bytes, str | None]:
        text = orjson.dumps(asked)
        return b"".join([text, *tensors]), str(len(text)) if tensors else None

    return put


@pytest.fixture(scope="session")
def refused():
    """Runs what must be refused; returns the detail."""

    def run(status: int, function, *arguments) -> str:
        with pytest.raises(ProblemError) as caught:
            function(*arguments)
        assert caught.value.status == status, caught.value.detail
        return caught.value.detail

    return run
