"""A minimal FastAPI application: a plain function, which runs in a thread."""

import os
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile

from benchmarks.serving.pipeline import Pipeline

app = FastAPI()
pipeline = Pipeline(Path(os.environ["MODEL"]), int(os.environ["THREADS"]))


@app.post("/detect")
def detect(file: UploadFile) -> dict[str, Any]:
    """Answer one image."""
    return pipeline(file.file.read())


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), log_level="warning", access_log=False)
