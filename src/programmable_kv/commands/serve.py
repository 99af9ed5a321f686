"""`pkv serve` and `pkv serve-key`: a gateway in front of a model server, or a server of one model, and API keys."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from programmable_kv.commands.common import err, load
from programmable_kv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from programmable_kv.serve.settings import GatewaySettings

_MIB = 2**20
_WITH_UPSTREAM = (
    "mode", "volatile", "upstream_key_env", "max_running", "read_timeout", "observe_mib", "skills", "cache_salt",
    "rebase_after", "line_role",
)  # fmt: skip
"""Names of the options that have no effect when a model is served."""


def serve(
    context: typer.Context,
    upstream: Annotated[
        list[str] | None,
        typer.Option(
            help="the model server to forward to, such as http://localhost:8000; repeatable, a conversation stays with one"
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="without --upstream: 'embedded', a Hub id, a folder, or a .gguf file")
    ] = "embedded",
    host: Annotated[
        str, typer.Option(help="the address to listen on; one other than this machine's needs API keys")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="the port to listen on")] = 8787,
    mode: Annotated[
        str,
        typer.Option(
            help="with --upstream: 'observe' reports on the prefix cache; 'pass' only forwards; 'erratum', 'hoist', 'strict'"
        ),
    ] = "observe",
    volatile: Annotated[
        Path | None,
        typer.Option(help="with --upstream: which pieces of prompts may change, and modes of routes; a JSON file"),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="where the state is kept: a file, by default in the user's data folder; or postgresql://USER@HOST/DATABASE, "
            "for several servers"
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="who may use the gateway: lines that `pkv serve-key` prints")
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(help="with --upstream: the environment variable with the key to send to it")
    ] = None,
    max_body_mib: Annotated[int, typer.Option(help="the largest request body, in MiB")] = 32,
    max_running: Annotated[int, typer.Option(help="with --upstream: requests that it handles at the same time")] = 256,
    max_waiting: Annotated[int, typer.Option(help="requests that wait for their turn; more get 429")] = 256,
    read_timeout: Annotated[
        float, typer.Option(help="with --upstream: seconds without a byte from it before a request fails")
    ] = 600.0,
    observe_mib: Annotated[
        int, typer.Option(help="with --upstream: memory for earlier requests to compare with, in MiB")
    ] = 256,
    max_notebooks: Annotated[
        int | None,
        typer.Option(
            help="notebooks kept for all tenants together; by default 64 without --upstream and 10000 with it"
        ),
    ] = None,
    skills: Annotated[
        str | None,
        typer.Option(
            help="for vLLM with this package's plugin: the folder or URL of its skill store; notebooks may name its skills"
        ),
    ] = None,
    per_minute: Annotated[
        float | None,
        typer.Option(help="requests per minute for each API key; `per-minute=` next to a key overrides it"),
    ] = None,
    cache_salt: Annotated[
        bool, typer.Option("--cache-salt", help="for vLLM: separate the tenants' caches with a `cache_salt`")
    ] = False,
    rebase_after: Annotated[
        int,
        typer.Option(
            help="with 'erratum' and notebooks of an upstream: lines after which the prefix with the new values is computed "
            "in the background"
        ),
    ] = 64,
    line_role: Annotated[
        str,
        typer.Option(
            help="with 'erratum', 'hoist' and notebooks of an upstream: lines are 'system' messages, 'user' messages, or "
            "'inline' in the newest one; 'auto' finds out what reaches the model"
        ),
    ] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", help="log a line for each request; never its text")] = False,
) -> None:
    """Run a gateway in front of a model server (--upstream), or serve a model.

    Both have notebooks (/v1/notebooks), whose fields are edited over HTTP.

    The gateway forwards Chat Completions, Completions, Responses, Messages and everything else under /v1 byte for byte.
    It reports at /pkv/report what the prefix cache missed, and has metrics for Prometheus at /metrics. With --mode
    erratum, if only declared values changed, or values that it has seen change repeatedly, it sends the earlier prompt
    again and states the new values in an appended line. Notebooks do this for their fields in every mode.
    """
    from programmable_kv.extras import require_extra, require_model_packages

    _check_together(_given(context))
    require_extra("serve", "starlette", "uvicorn", "httptools", "prometheus_client")
    if not upstream:
        require_model_packages(". Or give --upstream: a gateway in front of a model server needs neither")
    from programmable_kv.serve.access import read_keys
    from programmable_kv.serve.address import place_of
    from programmable_kv.serve.modes import GatewayMode
    from programmable_kv.serve.rewriting.forms import LineRole
    from programmable_kv.serve.rewriting.rules import Rules, read_rules
    from programmable_kv.serve.run import run_gateway, run_local
    from programmable_kv.serve.settings import GatewaySettings, Limits, LocalSettings, default_state

    if mode not in tuple(GatewayMode):
        raise InvalidArgumentError(f"--mode is one of {', '.join(GatewayMode)}, got {mode!r}")
    if line_role not in tuple(LineRole):
        raise InvalidArgumentError(f"--line-role is one of {', '.join(LineRole)}, got {line_role!r}")
    limits = Limits(
        max_body_bytes=max_body_mib * _MIB,
        max_running=max_running,
        max_waiting=max_waiting,
        read_s=read_timeout,
        observed_bytes=observe_mib * _MIB,
        per_minute=per_minute,
    )
    keys = read_keys(api_keys_file) if api_keys_file is not None else ()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    if verbose:
        logging.getLogger("programmable_kv.serve").setLevel(logging.INFO)
    kept = place_of(state) if state else default_state(f"{'gateway' if upstream else 'local'}-{port}")
    if not upstream:
        settings = LocalSettings(host, port, limits, keys, 64 if max_notebooks is None else max_notebooks, kept)
        run_local(partial(load, model), settings)
        return
    secret = _secret(upstream_key_env) if upstream_key_env is not None else ""
    rules = read_rules(volatile) if volatile is not None else Rules()
    first, *others = upstream
    gateway = GatewaySettings(
        first, host, port, GatewayMode(mode), limits, keys, secret, rules, kept, cache_salt, tuple(others), rebase_after,
        10_000 if max_notebooks is None else max_notebooks, skills, LineRole(line_role),
    )  # fmt: skip
    _check_used(_given(context), gateway)
    run_gateway(gateway)


def serve_key(name: Annotated[str, typer.Argument(help="the tenant's name")]) -> None:
    """Make an API key for `pkv serve`.

    Standard output gets the line for the file of API keys (--api-keys-file). Standard error gets the key, this once.
    """
    from programmable_kv.serve.access import new_key

    key, line = new_key(name)
    err.print(f"the key, shown this once: {key}", markup=False, highlight=False, soft_wrap=True)
    typer.echo(line)


def _given(context: typer.Context) -> set[str]:
    """Names of the options that were given on the command line."""
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }


def _check_together(given: set[str]) -> None:
    """
    Raises:
        InvalidArgumentError: an option of a gateway without --upstream, or one of a model with it.
    """
    if "upstream" in given:
        if "model" in given:
            raise InvalidArgumentError(
                "--model does not go with --upstream: a gateway loads no model, and requests name one of the upstream's. "
                "Leave one of the two out"
            )
        return
    if names := [_option(name) for name in _WITH_UPSTREAM if name in given]:
        them = "it" if len(names) == 1 else "them"
        raise InvalidArgumentError(
            f"{', '.join(names)} without --upstream would change nothing: without it, a model is served, and nothing is "
            f"forwarded. Add --upstream URL, or leave {them} out"
        )


def _check_used(given: set[str], settings: GatewaySettings) -> None:
    """
    Raises:
        InvalidArgumentError: the mode of every route makes an option useless.
    """
    mode = settings.mode.value
    if settings.rules.declared and not settings.rewrites:
        raise InvalidArgumentError(
            f"--volatile declares pieces that may change, and mode {mode} rewrites nothing: add --mode erratum or hoist, or "
            "leave --volatile out"
        )
    if "observe_mib" in given and not settings.observes:
        raise InvalidArgumentError(
            f"--observe-mib does not go with --mode {mode}, which compares no requests: leave one of the two out"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value or not value.isascii() or not value.isprintable():
        raise InvalidArgumentError(f"the environment variable {variable} has no usable key: set it, and start again")
    return value
