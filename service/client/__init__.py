"""A client of the service, synchronous and asynchronous. It needs httpx alone.

from service.client import Client

with Client("http://127.0.0.1:8000") as client:
    for found in client.detect("photo.jpg"):
        print(found.class_name, found.score, ">=", found.threshold, found.box)
"""

from service.client.answers import (
    ClassPreview,
    Detection,
    Model,
    ModelCard,
    Preview,
    Result,
    ServiceError,
)
from service.client.asynchronous import AsyncClient
from service.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "ClassPreview",
    "Client",
    "Detection",
    "Model",
    "ModelCard",
    "Preview",
    "Result",
    "ServiceError",
]
