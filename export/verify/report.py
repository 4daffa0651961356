"""The result of `ghm verify`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from export.verify.compare import Comparison
from ghm_triton.detection.evaluate import MeanAveragePrecision
from ghm_triton.tables import table

# Rounding may decide this share of the detections, or one; more indicates a fault.
BORDERLINE_SHARE = 0.01
SHOWN = 10  # mismatches listed per run


@dataclass
class VerifyReport:
    """A comparison of a file with its checkpoint.

    Attributes:
        images: Number of images compared.
        class_names: The classes in label order.
        runs: The comparison of each runtime, setting and batch size.
        problems: A description of each difference; empty if there is none.
        titles: Name and version of each runtime.
        missing: Runtimes that are not installed, with the command that installs them.
        average_precision: Of the checkpoint, and of the file in each runtime that runs all images,
            on those images; empty if they have no ground truth.
    """

    images: int
    class_names: tuple[str, ...]
    runs: dict[tuple[str, str, int], Comparison] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    average_precision: dict[str, MeanAveragePrecision] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the file detects the same as the checkpoint."""
        return not self.problems

    def run(self, runtime: str, setting: str, batch: int) -> Comparison:
        """The comparison of one runtime, setting and batch size, to add to."""
        return self.runs.setdefault((runtime, setting, batch), self._empty())

    def drop(self, runtime: str) -> None:
        """Remove the runs of a runtime that failed."""
        self.runs = {key: run for key, run in self.runs.items() if key[0] != runtime}

    def total(self, runtime: str | None = None) -> Comparison:
        """The sum of all runs, or of those of one runtime."""
        total = self._empty()
        for key, run in self.runs.items():
            if runtime in (None, key[0]):
                total.add(run)
        return total

    def conclude(self) -> None:
        """Add what the runs show to `problems`."""
        for (runtime, name, batch), run in self.runs.items():
            where = f"{runtime}, {name}, batch {batch}"
            self.problems += [f"{where}: {text}" for text in run.mismatches[:SHOWN]]
            if len(run.mismatches) > SHOWN:
                self.problems.append(f"{where}: {len(run.mismatches) - SHOWN} more like these")
        for runtime in self._runtimes():
            total = self.total(runtime)
            matched = int(total.matched.sum())
            allowed = max(1, int(BORDERLINE_SHARE * matched))
            if total.borderline > allowed:
                self.problems.append(
                    f"{runtime}: {total.borderline} detections are borderline, on one side alone;"
                    f" rounding explains at most {allowed} among {matched}"
                )
            if not matched and not total.mismatches:
                self.problems.append(
                    f"{runtime}: neither side detects anything in these images; nothing was"
                    " compared"
                )

    def table(self) -> str:
        """Format the report for a terminal."""
        lines = [f"{self.images} images, the file on a CPU against the checkpoint in torch"]
        lines += [f"{name} is not installed: {how}" for name, how in self.missing.items()]
        head = ("setting", "batch", "detections", "borderline", "max |score|", "max |box| px")
        for runtime in self._runtimes():
            rows = [
                (
                    name,
                    batch,
                    run.matched.sum(),
                    run.borderline,
                    f"{run.score:.1e}",
                    f"{run.box:.1e}",
                )
                for (ran, name, batch), run in self.runs.items()
                if ran == runtime
            ]
            by_class = zip(self.class_names, self.total(runtime).matched.tolist(), strict=True)
            counts = ", ".join(f"{name} {count}" for name, count in by_class)
            title = self.titles.get(runtime, runtime)
            lines += ["", title, table(head, rows), f"compared by class: {counts}"]
        if self.average_precision:
            results = self.average_precision.items()
            maps = [(side, f"{each.ap:.4f}", f"{each.ap50:.4f}") for side, each in results]
            lines += ["", table(("mAP", "AP", "AP50"), maps)]
        lines += [f"PROBLEM {problem}" for problem in self.problems]
        lines.append("the file does what the checkpoint does" if self.ok else "FAILED")
        return "\n".join(lines)

    def _runtimes(self) -> list[str]:
        return list(dict.fromkeys(runtime for runtime, _, _ in self.runs))

    def _empty(self) -> Comparison:
        return Comparison(np.zeros(len(self.class_names), dtype=np.int64))
