"""A short way to the routes that must be fast.

FastAPI finds a route by trying them all, resolves what it depends on, and opens stacks for what
may want closing: work for nothing where a route takes a request and returns a response. Such routes
are known beforehand, so their requests go straight to them. They stay FastAPI's for everything
else: for other methods and for the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute, APIRouter
from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import ProblemError, problem_response


class DirectMiddleware:
    """Answers requests whose method and path are exactly a route's; passes others on.

    Args:
        app: What answers the others.
        routes: Each takes a request, and nothing else, and returns a response.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[APIRoute]) -> None:
        self.app = app
        self.routes = {
            (method, route.path): route for route in routes for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        route = None
        if scope["type"] == "http":
            route = self.routes.get((scope["method"], scope["path"]))
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route  # whoever counts requests counts them by it
        try:
            response = await route.endpoint(Request(scope, receive))
        except ProblemError as error:
            response = problem_response(scope, error.status, error.detail, error.headers)
        await response(scope, receive, send)


def install(app: FastAPI, *routers: APIRouter) -> None:
    """Shorten the way to all `POST` routes of routers that take nothing but a request."""
    routes = [
        route
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        and route.methods == {"POST"}
        and not route.dependant.query_params
        and "{" not in route.path
    ]
    app.add_middleware(DirectMiddleware, routes=routes)
