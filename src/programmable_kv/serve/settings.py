"""The settings of a gateway and of a local server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from programmable_kv.arguments import require_count
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.access import ApiKey, is_loopback
from programmable_kv.serve.address import Address, DatabaseAddress
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.rebase import LINES
from programmable_kv.serve.rewriting.rules import Rules

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one server: sizes, numbers, rates and times."""

    max_body_bytes: int = 32 * _MIB
    max_running: int = 256
    """requests that are with the upstream at one time"""
    max_waiting: int = 256
    """requests that may wait for one of those to end; more are refused with 429"""
    wait_s: float = 30.0
    """a request that has waited this long is refused with 503"""
    body_s: float = 60.0
    """how long a client may take to send its body"""
    connect_s: float = 10.0
    read_s: float = 600.0
    """how long the upstream may be silent, before its answer and within it"""
    stall_s: float = 60.0
    """how long a client may read nothing of its answer"""
    shutdown_s: float = 30.0
    """how long open requests may take to end when the server gets SIGTERM"""
    interrupt_s: float = 5.0
    """the same after Ctrl-C, when somebody is waiting"""
    observed_bytes: int = 256 * _MIB
    """bytes of memory for earlier requests to compare with"""
    queued_bytes: int = 64 * _MIB
    """bytes of requests and answers that may wait to be compared; more are left out and counted"""

    per_minute: float | None = None
    """requests that a tenant without a rate of its own may make in a minute; None sets no limit"""
    conversations: int = 100_000
    """conversations kept for rewriting; those that were silent longest are forgotten first"""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_running", "observed_bytes", "queued_bytes", "conversations"):
            require_count(getattr(self, name), name, least=1)
        require_count(self.max_waiting, "max_waiting")
        if self.per_minute is not None and not self.per_minute > 0:
            raise InvalidArgumentError(f"per_minute must be a number of requests above 0, got {self.per_minute!r}")
        for name in ("wait_s", "body_s", "connect_s", "read_s", "stall_s", "shutdown_s", "interrupt_s"):
            if not getattr(self, name) > 0:
                raise InvalidArgumentError(f"{name} must be a number of seconds above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The settings of one gateway.

    Raises:
        InvalidArgumentError: an upstream is not an http or https URL or is given twice, a number is out of range, or the
            gateway would be open to other machines without API keys.
    """

    upstream: str
    host: str = "127.0.0.1"
    port: int = 8787
    mode: GatewayMode = GatewayMode.OBSERVE
    limits: Limits = Limits()
    keys: tuple[ApiKey, ...] = ()
    """who may use the gateway; without keys, anybody on this machine"""
    upstream_key: str = field(default="", repr=False)
    """sent to the upstream instead of the client's credentials"""
    rules: Rules = field(default_factory=Rules)
    """which pieces of prompts may change, and modes of single routes"""
    state: Path | DatabaseAddress | None = None
    """the file or the database in which conversations are kept; None keeps them in memory"""
    salts: bool = False
    """whether each tenant's prompts get a `cache_salt` of their own, for vLLM"""
    more_upstreams: tuple[str, ...] = ()
    """further upstreams, like the first: each conversation goes to one of all"""
    rebase_after: int = LINES
    """lines of a conversation after which the prefix with its new values is computed in the background"""
    max_notebooks: int = 10_000
    """notebooks that are kept, of all tenants together"""
    skills: str | None = None
    """the store of the plugin in the upstream's vLLM; notebooks may name its skills"""
    line_role: LineRole = LineRole.AUTO
    """the role in which lines are sent"""

    def __post_init__(self) -> None:
        require_count(self.rebase_after, "rebase_after", least=1)
        require_count(self.max_notebooks, "max_notebooks", least=1)
        places = [address.plain for address in self.addresses]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise InvalidArgumentError(f"give each upstream only once, got {twice} twice")
        _check_listening(self.host, self.port, self.keys)

    @property
    def rewrites(self) -> bool:
        """Whether requests of any route may be rewritten, or are in mode `strict`."""
        return bool({self.mode, *self.rules.routes.values()} - {GatewayMode.OBSERVE, GatewayMode.PASS})

    @property
    def observes(self) -> bool:
        """Whether requests of any route are observed."""
        return bool({self.mode, *self.rules.routes.values()} - {GatewayMode.PASS})

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses of all upstreams."""
        return tuple(Address(url) for url in (self.upstream, *self.more_upstreams))


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """The settings of a server whose model runs in this process.

    Raises:
        InvalidArgumentError: a number is out of range, or the server would be open to other machines without API keys.
    """

    host: str = "127.0.0.1"
    port: int = 8787
    limits: Limits = Limits()
    keys: tuple[ApiKey, ...] = ()
    max_notebooks: int = 64
    state: Path | DatabaseAddress | None = None
    """the file or the database in which notebooks are kept; None keeps them in memory"""

    def __post_init__(self) -> None:
        require_count(self.max_notebooks, "max_notebooks", least=1)
        _check_listening(self.host, self.port, self.keys)


def default_state(name: str) -> Path:
    """The default file of state, in the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("programmable-kv") / f"{name}.sqlite3"


def _check_listening(host: str, port: int, keys: tuple[ApiKey, ...]) -> None:
    if not 0 <= port <= 65535:
        raise InvalidArgumentError(f"a port must be from 0 to 65535, got {port}")
    if not keys and not is_loopback(host.strip("[]")):
        raise InvalidArgumentError(
            f"without API keys the server can listen on this machine only, not on {host!r}: give --api-keys-file"
        )
