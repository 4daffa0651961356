"""LitServe with its defaults: one worker process and one HTTP process."""

import os
from pathlib import Path
from typing import Any

import litserve
from fastapi import UploadFile

from benchmarks.serving.pipeline import Pipeline


class Detector(litserve.LitAPI):
    """Decodes in `decode_request`, infers in `predict`."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Load the model in the worker."""
        self.pipeline = Pipeline(Path(os.environ["MODEL"]), int(os.environ["THREADS"]))

    def decode_request(self, request: UploadFile) -> Any:
        """Decode an image to a row."""
        return self.pipeline.prepare(request.file.read())

    def predict(self, prepared: Any) -> dict[str, Any]:
        """Run the model on a row."""
        return self.pipeline.infer(*prepared)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the answer unchanged."""
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Detector(), accelerator="cpu")
    port = int(os.environ["PORT"])
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
