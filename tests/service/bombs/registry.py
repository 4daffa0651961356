"""Every file of the corpus by name, with what builds its bytes."""

from collections.abc import Callable

BUILDERS: dict[str, Callable[[], bytes]] = {}


def case(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Register a file. Its name begins with its status and ends as its kind."""

    def register(build: Callable[[], bytes]) -> Callable[[], bytes]:
        BUILDERS[name] = build
        return build

    return register
