"""BentoML with one worker."""

import os
from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from benchmarks.serving.pipeline import Pipeline


@bentoml.service(workers=1, traffic={"timeout": 60})
class Detector:
    """Answers a file with a JSON object."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(Path(os.environ["MODEL"]), int(os.environ["THREADS"]))

    @bentoml.api
    def detect(self, file: Annotated[Path, ContentType("image/*")]) -> dict[str, Any]:
        """Answer one image."""
        return self.pipeline(file.read_bytes())


if __name__ == "__main__":
    Detector.serve_http(port=int(os.environ["PORT"]))
