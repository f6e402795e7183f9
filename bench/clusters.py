"""Two throw-away PostgreSQL clusters with fsync on, and the databases that the contenders write.

`old` and `new` are ordinary servers on ports of their own, run as user `postgres` when this runs as root. Whatever
happens, `stop` kills them and removes their files.
"""

import glob
import os
import random
import shutil
import socket
import subprocess
import tempfile

TABLES = ["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"]

# What a small real server might have. Durable: a commit is a flush.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "max_connections": "1200",
    "listen_addresses": "127.0.0.1",
    "log_min_messages": "fatal",
}


class Failed(Exception):
    """Something the bench cannot go on without; its text is for people."""


def bindir():
    """The directory of the newest server's programs."""
    found = [os.environ.get("CROSSFADE_PG_BIN", "")]
    versions = glob.glob("/usr/lib/postgresql/*/bin")
    found += sorted(versions, key=lambda path: [int(n) for n in path.split("/")[4].split(".") if n.isdigit()], reverse=True)
    if shutil.which("pg_config"):
        found.append(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
    for path in found:
        if path and os.path.exists(os.path.join(path, "initdb")):
            return path
    raise Failed("no PostgreSQL server found: apt-get install postgresql, or set CROSSFADE_PG_BIN to its bin directory")


def program(name):
    """A program of that server, or of PATH."""
    path = os.path.join(bindir(), name)
    return path if os.path.exists(path) else name


def as_server_user(command):
    """PostgreSQL, PgBouncer and Pgpool-II refuse to run as root."""
    if os.geteuid() != 0:
        return command
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"] + command


GIVEN_PORTS = set()


def free_port():
    """A port that nobody listens on and that is given once; below those that the kernel takes for the near end of a connection, or a client might take it first."""
    for _ in range(1000):
        port = random.randrange(15000, 30000)
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in GIVEN_PORTS:
            GIVEN_PORTS.add(port)
            return port
    raise Failed("no free port between 15000 and 30000")


def scratch(parent):
    """A directory for everything, which the server's user may enter."""
    path = tempfile.mkdtemp(prefix="crossfade-bench-", dir=parent)
    os.chmod(path, 0o711)
    return path


def own_directory(path):
    os.makedirs(path)
    if os.geteuid() == 0:
        shutil.chown(path, "postgres", "postgres")
    os.chmod(path, 0o700)
    return path


class Cluster:
    def __init__(self, name, directory):
        self.name = name
        self.directory = own_directory(os.path.join(directory, name))
        self.port = free_port()
        self.process = None
        self._initdb()
        self._start()

    def _run(self, command):
        done = subprocess.run(as_server_user(command), capture_output=True, text=True, cwd=self.directory)
        if done.returncode != 0:
            raise Failed(f"{command[0]} failed for {self.name}:\n{done.stderr or done.stdout}")

    def _initdb(self):
        self.data = os.path.join(self.directory, "data")
        self._run([program("initdb"), "-D", self.data, "-U", "postgres", "--auth=trust", "--locale=C", "-E", "UTF8"])
        lines = [f"{key} = '{value}'\n" for key, value in SETTINGS.items()]
        lines += [f"port = {self.port}\n", f"unix_socket_directories = '{self.directory}'\n"]
        with open(os.path.join(self.data, "postgresql.conf"), "a", encoding="utf-8") as conf:
            conf.writelines(lines)

    def _start(self):
        log = os.path.join(self.directory, "log")
        self._run([program("pg_ctl"), "-D", self.data, "-l", log, "-w", "-t", "60", "start"])

    def pid(self):
        """Of the server's first process."""
        with open(os.path.join(self.data, "postmaster.pid"), encoding="utf-8") as file:
            return int(file.readline())

    def stop(self):
        command = [program("pg_ctl"), "-D", self.data, "-m", "immediate", "-w", "stop"]
        subprocess.run(as_server_user(command), capture_output=True, cwd="/")

    def sql(self, database, text):
        """Runs SQL; the rows as lines of `|`-separated values."""
        command = [program("psql"), "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(self.port)]
        command += ["-U", "postgres", "-d", database]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"psql on {self.name}: {done.stderr.strip()}")
        return done.stdout.splitlines()

    def create(self, database, scale, rows=True):
        """A database with pgbench's tables; without rows where `rows` is false."""
        self.sql("postgres", f"CREATE DATABASE {database}")
        steps = "dtGvp" if rows else "dtp"
        command = [program("pgbench"), "-i", "-q", "-I", steps, "-s", str(scale), "-h", "127.0.0.1", "-p", str(self.port)]
        done = subprocess.run(command + ["-U", "postgres", database], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"pgbench -i on {self.name}: {done.stderr.strip()}")

    def settle(self, databases):
        """The same start for every run: small tables without dead rows, no checkpoint due."""
        for database in databases:
            self.sql(database, "VACUUM pgbench_branches; VACUUM pgbench_tellers")
        self.sql("postgres", "CHECKPOINT")


def rows_apart(old, new, database):
    """Rows of pgbench's tables that only one side has, by table; a changed row counts once. Asks the servers directly."""
    apart = {}
    for table in TABLES:
        digest = f"SELECT count(*), sum(hashtextextended((t.*)::text, 0)) FROM {table} t"
        if old.sql(database, digest) == new.sql(database, digest):
            apart[table] = 0
            continue
        surplus = {}
        for cluster, by in ((old, 1), (new, -1)):
            for line in cluster.sql(database, f"SELECT (t.*)::text FROM {table} t"):
                surplus[line] = surplus.get(line, 0) + by
        only_old = sum(n for n in surplus.values() if n > 0)
        only_new = -sum(n for n in surplus.values() if n < 0)
        apart[table] = max(only_old, only_new)
    return apart


def row_counts(cluster, database):
    return {table: int(cluster.sql(database, f"SELECT count(*) FROM {table}")[0]) for table in TABLES}
