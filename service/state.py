"""What one running service holds, and how its routes get at it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from service.model import ModelError, ServedModel
from service.problems import ProblemError
from service.settings import Settings

logger = logging.getLogger("ghm.service")

_RETRY_AFTER = {"Retry-After": "1"}


@dataclass
class ServiceState:
    """The settings, the model, and the limits that keep work from piling up.

    Attributes:
        settings: What the service was told.
        model: None until it is loaded.
        waiting_for: Why the model is not ready, while it is not.
        decoders: Images decoded at a time. A decoded image is large, so this bounds memory too.
        inferences: One at a time, each with all the threads.
    """

    settings: Settings
    model: ServedModel | None = None
    waiting_for: str = "the model is not loaded"
    decoders: CapacityLimiter = field(init=False)
    inferences: CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        self.decoders = CapacityLimiter(self.settings.threads)
        self.inferences = CapacityLimiter(1)

    def ready_model(self) -> ServedModel:
        """The model, once it has answered its warm-up.

        Raises:
            ProblemError: 503 before that.
        """
        if self.model is None or not self.model.warm:
            raise ProblemError(503, f"not ready: {self.waiting_for}", _RETRY_AFTER)
        return self.model

    def loaded_model(self) -> ServedModel:
        """The model, once it is loaded.

        Raises:
            ProblemError: 503 before that.
        """
        if self.model is None:
            raise ProblemError(503, f"not ready: {self.waiting_for}", _RETRY_AFTER)
        return self.model

    async def warm_up(self) -> None:
        """Let the model answer once. If it cannot, the service stays unready and says why."""
        model = self.loaded_model()
        if model.warm:
            return
        self.waiting_for = "the model is warming up"
        try:
            await to_thread.run_sync(model.warm_up, limiter=self.inferences)
        except ModelError as error:
            self.waiting_for = f"the model failed its warm-up: {error}"
            logger.error("%s", self.waiting_for)


def service_state(request: Request) -> ServiceState:
    """The state of the service that a request came to."""
    state = request.app.state.service
    if not isinstance(state, ServiceState):
        raise TypeError(f"app.state.service must be a ServiceState, got {type(state).__name__}")
    return state
