"""Where the time of a request went, for its answer."""

from __future__ import annotations

from time import perf_counter


class Timer:
    """Milliseconds of the parts of a request, from when it is made."""

    def __init__(self) -> None:
        self._started = perf_counter()
        self._parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """All the time until now was this part."""
        self._parts[part] = (perf_counter() - self._started) * 1000

    def add(self, part: str, seconds: float) -> None:
        """So much more was this part."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds * 1000

    def done(self) -> dict[str, float]:
        """Every part and `total_ms`, rounded to microseconds."""
        total = (perf_counter() - self._started) * 1000
        return {name: round(ms, 3) for name, ms in {**self._parts, "total_ms": total}.items()}
