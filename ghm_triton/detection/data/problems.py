"""Problems in the annotations of a data set, reported by file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

OnDamage = Literal["skip", "refuse"]

_SHOWN = 10


@dataclass(frozen=True)
class AnnotationProblem:
    """One problem in one file.

    Attributes:
        source: The file, relative to the root of the data set.
        message: The problem, and how it was handled.
    """

    source: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


class DamagedAnnotationError(ValueError):
    """The data set is damaged and the policy is `refuse`, or nothing usable is left.

    Attributes:
        problems: All problems; the message names the first ten and the total.
    """

    def __init__(self, name: str, problems: list[AnnotationProblem]) -> None:
        self.problems = tuple(problems)
        self.name = name
        total = len(problems)
        lines = [f"{name}: {total} problem{'' if total == 1 else 's'} in the annotations"]
        lines += [f"  {problem}" for problem in problems[:_SHOWN]]
        if total > _SHOWN:
            lines.append(f"  ... and {total - _SHOWN} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception raised in a data loader's worker process travels back by pickle.
        return type(self), (self.name, list(self.problems))


@dataclass
class ProblemLog:
    """Problems collected while a data set is read, and the policy about them.

    Attributes:
        name: The data set, for the message.
        on_damage: The policy.
        problems: The problems so far, in reading order.
    """

    name: str
    on_damage: OnDamage
    problems: list[AnnotationProblem] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_policy(self.on_damage)

    def report(self, source: str, message: str) -> None:
        """Record one problem."""
        self.problems.append(AnnotationProblem(source, message))

    def settle(self) -> list[AnnotationProblem]:
        """Apply the policy; returns the problems.

        Raises:
            DamagedAnnotationError: There are problems and the policy is `"refuse"`.
        """
        if self.on_damage == "refuse" and self.problems:
            raise DamagedAnnotationError(self.name, self.problems)
        return self.problems


def check_policy(on_damage: str) -> None:
    """Raise `ValueError` unless `on_damage` is a known policy."""
    if on_damage not in get_args(OnDamage):
        raise ValueError(f"on_damage must be one of {get_args(OnDamage)}, got {on_damage!r}")
