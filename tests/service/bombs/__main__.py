"""Image files that lie or break, each with the status it is answered with.

Run to write them into `corpus/`, one file each, named by status; the tests read them from there:

    python tests/service/bombs
"""

from importlib import import_module
from pathlib import Path

from registry import BUILDERS

CORPUS = Path(__file__).parents[1] / "corpus"
KINDS = ["honest", "png", "jpeg", "tiff", "gif", "webp", "bmp", "bodies", "others"]

for kind in KINDS:
    import_module(kind)  # which registers its files


def write() -> None:
    """Write every file into the corpus."""
    CORPUS.mkdir(exist_ok=True)
    for name, build in BUILDERS.items():
        (CORPUS / name).write_bytes(build())


if __name__ == "__main__":
    write()
