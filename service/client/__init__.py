"""A client of the service, synchronous and asynchronous. It needs httpx alone.

```python
from service.client import Client

with Client("http://127.0.0.1:8000") as client:
    for detection in client.detect("photo.jpg"):
        print(detection.class_name, detection.score, ">=", detection.threshold, detection.box)
```
"""

from ghm_triton.extras import needed_by
from service.client.answers import (
    ClassPreview,
    Detection,
    Model,
    ModelCard,
    Preview,
    Result,
    ServiceError,
)

with needed_by("service.client", "client"):
    from service.client.clients import AsyncClient, Client

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
