"""Runs a gateway, or a server of a model, until it is told to stop. Requests that run may end first."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from programmable_kv.serve.app import gateway_app
from programmable_kv.serve.protocol import MOST_HEAD, ClientProtocol
from programmable_kv.serve.settings import GatewaySettings, LocalSettings

if TYPE_CHECKING:
    from programmable_kv.models.load import Model

_BACKLOG = 2048
_SWITCH_S = 5e-4
"""how long the observer's thread may hold up the event loop at a time; Python's own 5 ms would be most of a request's time"""


def server_of(settings: GatewaySettings | LocalSettings, app: Starlette) -> uvicorn.Server:
    """A server of an application, not yet running. It adds no headers of its own, and logs no paths, queries or bodies."""
    config = uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        loop="auto",  # uvloop, where there is one for the system
        http=ClientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=MOST_HEAD,
        timeout_graceful_shutdown=max(1, round(settings.limits.shutdown_s)),
    )
    return uvicorn.Server(config)


def run_gateway(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    sys.setswitchinterval(_SWITCH_S)
    server_of(settings, gateway_app(settings)).run()


def run_local(model: Model, settings: LocalSettings) -> None:
    """Serve a model until SIGINT or SIGTERM."""
    from programmable_kv.serve.local.server import local_app

    server_of(settings, local_app(model, settings)).run()
