"""What is wrong with a data set, reported by file and never passed over in silence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

OnDamage = Literal["skip", "refuse"]

_SHOWN = 10


@dataclass(frozen=True)
class AnnotationProblem:
    """One thing that is wrong with one file.

    Attributes:
        source: The file, relative to the root of the data set.
        message: What is wrong with it and what was done about it.
    """

    source: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


class DamagedAnnotationError(ValueError):
    """The data set is damaged, and was to be refused if so or has nothing usable left.

    Attributes:
        problems: Everything that is wrong; the message names the first ten and the total.
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
    """Collects problems while a data set is read, then applies the policy.

    Attributes:
        name: The data set, for the message.
        on_damage: The policy.
        problems: What was reported so far, in reading order.
    """

    name: str
    on_damage: OnDamage
    problems: list[AnnotationProblem] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_policy(self.on_damage)

    def report(self, source: str, message: str) -> None:
        """Records one problem."""
        self.problems.append(AnnotationProblem(source, message))

    def settle(self) -> list[AnnotationProblem]:
        """Returns the problems under `"skip"`.

        Raises:
            DamagedAnnotationError: There are problems and the policy is `"refuse"`.
        """
        if self.on_damage == "refuse" and self.problems:
            raise DamagedAnnotationError(self.name, self.problems)
        return self.problems


def check_policy(on_damage: str) -> None:
    """Raises `ValueError` unless `on_damage` is a known policy."""
    if on_damage not in get_args(OnDamage):
        raise ValueError(f"on_damage must be one of {get_args(OnDamage)}, got {on_damage!r}")
