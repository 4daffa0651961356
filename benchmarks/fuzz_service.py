"""Fuzz the parsers of the service for requests that they fail to refuse properly.

    python -m benchmarks.fuzz_service --minutes 10 [--target infer] [--keep FOLDER]

Mutates the corpus of the tests and the cases found on the way; a case with a new outcome is kept. A
parser may accept a case or refuse it with a 4xx; anything else, or a second of CPU time for one
case, is a failure, which is written to the folder and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import monotonic, process_time

from benchmarks.fuzz_intake import (
    mutate_image,
    mutate_json_body,
    read_form,
    read_image,
    read_json,
)
from benchmarks.fuzz_json import mutate_json
from export.card import DetectorCard, Preprocessing, TrainingCard
from ghm_triton.evidence import ClassStatistics
from service.core.errors import ProblemError
from service.core.settings import Settings
from service.http.encodings import Inflater
from service.v2.inference import read

CORPUS = Path(__file__).parents[1] / "tests" / "service"

# CPU time, far above that of the slowest valid case.
SLOW_SECONDS = 1.0

# Values that refusals quote; refusals that differ only in them are one outcome.
_VALUE = re.compile(r"['\"[{].*|-?(\d[-+.\de]*|inf|nan)|True|False|None", re.DOTALL)

_LONGEST = 2**18
_INTERESTING = (b"0", b"-1", b"1e400", b"NaN", b"4294967296", b"18446744073709551616", b"null")


def make_card(kind: str) -> DetectorCard:
    """Make the card of a detector with two classes and 4 x 6 pixels."""
    names = ["dog", "cat"]
    evidence = {"source": "policy", "support": 1, "ground_truths": 1}
    return DetectorCard.model_validate(
        {
            "name": "fuzzed",
            "architecture": "none",
            "backbone": "none",
            "input": kind,
            "class_names": names,
            "threshold_policy": "f1",
            "thresholds": [{"name": name, "threshold": 0.5, **evidence} for name in names],
            "iou_threshold": 0.5,
            "candidates": 10,
            "max_detections": 5,
            "preprocessing": Preprocessing(height=4, width=6, mean=(0, 0, 0), std=(1, 1, 1)),
            "statistics": ClassStatistics(
                class_names=tuple(names),
                anchors=2,
                positives=[1, 1],
                ground_truths=[1, 1],
                positive_scores=[[1]] * 2,
                negative_scores=[[1]] * 2,
            ),
            "training": TrainingCard(
                data="none", losses={}, seed=0, steps=0, versions={}, checkpoint_sha256="0" * 64
            ),
        }
    )


def _infer(kind: str) -> Callable[[bytes], None]:
    """Make a target for cases of the header's value (`-`: no header), a line feed and the body."""
    card = make_card(kind)
    settings = Settings(model=Path("fuzzed.onnx"), max_pixels=1000)

    def run(case: bytes) -> None:
        header, _, body = case.partition(b"\n")
        read(body, None if header == b"-" else header.decode("latin-1"), card, settings)

    return run


def _inflate(case: bytes) -> None:
    """Run a case of a coding, a line feed and a body."""
    coding, _, body = case.partition(b"\n")
    inflater = Inflater("gzip" if coding == b"gzip" else "deflate", 2**20)
    inflater.feed(body)
    inflater.finish()


def mutate_bytes(case: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Flip, insert, remove or repeat bytes, or cross over with another case."""
    data = bytearray(case)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        place = chance.randrange(len(data) + 1)
        stop = min(len(data), place + chance.choice((1, 1, 2, 4, 16, 64)))
        match chance.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place:place] = chance.randbytes(chance.choice((1, 1, 2, 8)))
            case 2:
                del data[place:stop]
            case 3:
                data[stop:stop] = data[place:stop] * chance.choice((1, 2, 50))
            case 4:
                data[place:stop] = chance.choice(_INTERESTING)
            case _:
                other = chance.choice(others)
                data[place:] = other[chance.randrange(len(other) + 1) :]
    return bytes(data[:_LONGEST])


def mutate_infer(case: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Mutate the JSON, mostly with a matching header, or the bytes."""
    header, _, body = case.partition(b"\n")
    length = int(header) if header.isdigit() and len(header) < 10 else len(body)
    if chance.random() < 0.3:
        return mutate_bytes(case, chance, others)
    try:
        asked = json.loads(body[:length])
    except (ValueError, RecursionError):
        return mutate_bytes(case, chance, others)
    text = json.dumps(mutate_json(asked, chance), separators=(",", ":")).encode()
    if header == b"-":
        return b"-\n" + text
    told = len(text) + chance.choice((0, 0, 0, 0, 1, -1))
    return str(told).encode() + b"\n" + text + body[length:]


def mutate_inflate(case: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Mutate the content before compression, or the compressed bytes."""
    if chance.random() < 0.7:
        return mutate_bytes(case, chance, others)
    content = chance.randbytes(chance.randrange(64)) * chance.choice((1, 1, 100, 100, 20_000))
    compress = gzip.compress if case.startswith(b"gzip") else zlib.compress
    return case.partition(b"\n")[0] + b"\n" + compress(content, chance.randrange(10))


@dataclass
class Target:
    """A parser to fuzz.

    Attributes:
        run: Takes a case; raises ProblemError to refuse it.
        mutate: Makes a new case from one case and all others.
        corpus: Folder of the corpus.
        pattern: File names of its cases.
        outcomes: First case of every outcome.
    """

    run: Callable[[bytes], object]
    mutate: Callable[[bytes, random.Random, list[bytes]], bytes]
    corpus: Path
    pattern: str
    outcomes: dict[str, bytes] = field(default_factory=dict)

    def cases(self) -> list[bytes]:
        """Read the corpus, in order of names."""
        return [path.read_bytes() for path in sorted(self.corpus.glob(self.pattern))]

    def outcome(self, case: bytes) -> str:
        """Return the outcome of a case, without the values that it quotes.

        Raises:
            Exception: The parser raised another exception, or refused with another status.
        """
        try:
            self.run(case)
        except ProblemError as error:
            if not 400 <= error.status < 500:
                raise
            return f"{error.status} {_VALUE.sub('#', error.detail)}"
        return "accepted"


TARGETS = {
    "infer": Target(_infer("float32"), mutate_infer, CORPUS / "v2" / "corpus", "infer-*"),
    "infer-uint8": Target(_infer("uint8"), mutate_infer, CORPUS / "v2" / "corpus", "infer-*"),
    "inflate": Target(_inflate, mutate_inflate, CORPUS / "v2" / "corpus", "inflate-*"),
    "image": Target(read_image, mutate_image(mutate_bytes), CORPUS / "corpus", "[0-9]*"),
    "form": Target(read_form, mutate_bytes, CORPUS / "corpus", "form-*"),
    "json": Target(read_json, mutate_json_body(mutate_bytes), CORPUS / "corpus", "json-*"),
}


def fuzz(name: str, seconds: float, chance: random.Random, keep: Path | None) -> bool:
    """Try cases until the time is up; return whether none failed."""
    target = TARGETS[name]
    cases = target.cases()
    tried, slowest, good = 0, 0.0, True
    end = monotonic() + seconds
    while monotonic() < end:
        case = cases[tried] if tried < len(cases) else _mutated(target, cases, chance)
        tried += 1
        started = process_time()
        try:
            outcome = target.outcome(case)
        except Exception:  # noqa: BLE001  any other exception is a finding
            outcome, good = f"FAILED {traceback.format_exc(limit=-1)}", False
        took = process_time() - started
        slowest = max(slowest, took)
        if took > SLOW_SECONDS:
            outcome, good = f"SLOW {took:.1f} s", False
        if outcome not in target.outcomes:
            target.outcomes[outcome] = case
            cases.append(case)
            print(f"{name}: {outcome}")
            _write(keep, name, case)
    print(
        f"{name}: {tried} cases, {len(target.outcomes)} outcomes, slowest {slowest * 1000:.1f} ms"
    )
    return good


def _mutated(target: Target, cases: list[bytes], chance: random.Random) -> bytes:
    return target.mutate(chance.choice(cases), chance, cases)


def _write(keep: Path | None, name: str, case: bytes) -> None:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}-{sha256(case).hexdigest()[:12]}").write_bytes(case)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write every case with a new outcome here")
    given = parser.parse_args()
    names = given.target or list(TARGETS)
    seconds = given.minutes * 60 / len(names)
    chance = random.Random(given.seed)  # noqa: S311  not for security
    good = [fuzz(name, seconds, chance, given.keep) for name in names]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
