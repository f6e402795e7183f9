"""What stands between pgbench and the servers: nothing, PgBouncer, Pgpool-II, or Crossfade."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

from clusters import Failed, as_server_user, free_port, own_directory

# Connections that each contender is set up for, the memory test's included.
CONNECTIONS = 1000


def install(package, binary, path):
    """Debian's package, where the program is not there yet."""
    found = shutil.which(binary, path=path)
    if found:
        return found
    command = ["apt-get", "install", "-y", "--no-install-recommends", package]
    if os.geteuid() != 0:
        command = ["sudo", "-n"] + command
    print(f"{binary} is not installed: {' '.join(command)}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    found = shutil.which(binary, path=path)
    if not found:
        raise Failed(f"{binary} cannot be installed (leave it out with --only):\n{(done.stderr or done.stdout).strip()}")
    return found


SBIN = "/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", "")


PGBENCH = ("simple", "extended", "prepared")
# What keeps no idle connections of its own, or is there twice.
NO_MEMORY = ("direct", "crossfade mirror down", "by hand")
# Prepared statements by bench/by_hand instead of pgbench.
OWN = ("own",)


class Contender:
    """A way to the database. `mirrored`: it writes both servers. `protocols`: what it is measured with."""

    mirrored = False
    protocols = PGBENCH
    process = None
    stop_signal = signal.SIGTERM

    def __init__(self, name, database, port):
        self.name, self.database, self.port = name, database, port

    def start(self):
        """Starts it; answers when it takes connections."""

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def settled(self):
        """Waits until nothing is left to be done on the other server."""

    def addresses(self):
        """Where bench/by_hand sends its transactions to, as its arguments."""
        return ["--old", f"127.0.0.1:{self.port}"]

    def _spawn(self, command, log):
        with open(log, "ab") as out:
            # A group of its own: Ctrl-C is ours, and a group can be killed as a whole.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        self.log = log

    def _wait_for_port(self, seconds=30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                time.sleep(0.05)
        raise Failed(f"{self.name} did not start:\n{self._log_tail()}")

    def _log_tail(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return "".join(log.readlines()[-20:])


class Direct(Contender):
    protocols = PGBENCH + OWN

    def __init__(self, old, database):
        super().__init__("direct", database, old.port)


class RawRelay(Contender):
    """bench/raw_relay.rs: frames read and passed on, and nothing else. The least that a proxy costs."""

    def __init__(self, server, database, directory, binary, name="raw-relay"):
        super().__init__(name, database, free_port())
        self.server, self.directory, self.binary = server, directory, binary

    def start(self):
        os.makedirs(self.directory, exist_ok=True)
        command = [self.binary, f"127.0.0.1:{self.port}", f"127.0.0.1:{self.server.port}"]
        self._spawn(command, os.path.join(self.directory, "log"))
        self._wait_for_port()


class ByHand(RawRelay):
    """bench/by_hand writes both servers itself: old through the relay, as if it were a proxy, and new directly."""

    mirrored = True
    protocols = OWN

    def __init__(self, old, new, database, directory, relay, crossfade):
        super().__init__(old, database, directory, relay, "by hand")
        self.new, self.crossfade = new, crossfade

    def start(self):
        super().start()
        config = os.path.join(self.directory, "crossfade.yaml")
        write(config, f"listen: 127.0.0.1:{free_port()}\nphase: old\n" + sides(self.server, self.new, self.database))
        done = subprocess.run([self.crossfade, "install", "--config", config], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"crossfade install: {done.stderr.strip()}")

    def addresses(self):
        return super().addresses() + ["--new", f"127.0.0.1:{self.new.port}"]


class PgBouncer(Contender):
    """Session mode: one server connection for each client, as Crossfade has."""

    def __init__(self, old, database, directory):
        super().__init__("pgbouncer", database, free_port())
        self.old, self.directory = old, directory

    def start(self):
        binary = install("pgbouncer", "pgbouncer", SBIN)
        own_directory(self.directory)
        users = os.path.join(self.directory, "users.txt")
        ini = os.path.join(self.directory, "pgbouncer.ini")
        settings = {
            "listen_addr": "127.0.0.1", "listen_port": self.port, "unix_socket_dir": "",
            "auth_type": "trust", "auth_file": users, "pool_mode": "session",
            "max_client_conn": CONNECTIONS + 50, "default_pool_size": CONNECTIONS, "max_db_connections": 0,
            "log_connections": 0, "log_disconnections": 0, "server_idle_timeout": 5, "stats_period": 3600,
        }
        write(users, '"postgres" ""\n')
        text = f"[databases]\n* = host=127.0.0.1 port={self.old.port}\n[pgbouncer]\n"
        write(ini, text + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        self._spawn(as_server_user([binary, "-q", ini]), os.path.join(self.directory, "log"))
        self._wait_for_port()


class Pgpool(Contender):
    """Pgpool-II's native replication: every write statement goes to both servers, a read to the first."""

    mirrored = True
    stop_signal = signal.SIGINT  # its fast shutdown; SIGTERM waits for clients

    def __init__(self, old, new, database, directory, children):
        super().__init__("pgpool", database, free_port())
        self.servers, self.directory, self.children = (old, new), directory, children

    def start(self):
        binary = install("pgpool2", "pgpool", SBIN)
        own_directory(self.directory)
        path = lambda name: os.path.join(self.directory, name)
        settings = {
            "backend_clustering_mode": "native_replication", "listen_addresses": "127.0.0.1", "port": self.port,
            "pcp_listen_addresses": "127.0.0.1", "pcp_port": free_port(), "socket_dir": self.directory, "pcp_socket_dir": self.directory,
            "num_init_children": self.children, "max_pool": 1, "listen_backlog_multiplier": 4, "child_life_time": 0,
            "load_balance_mode": "off", "replicate_select": "off", "insert_lock": "off",
            "replication_stop_on_mismatch": "off", "failover_if_affected_tuples_mismatch": "off", "failover_on_backend_error": "off",
            "enable_pool_hba": "off", "pool_passwd": "", "health_check_period": 0, "sr_check_period": 0, "use_watchdog": "off",
            "pid_file_name": path("pid"), "logdir": self.directory, "log_min_messages": "error", "memory_cache_enabled": "off",
        }
        for number, server in enumerate(self.servers):
            settings[f"backend_hostname{number}"] = "127.0.0.1"
            settings[f"backend_port{number}"] = server.port
            settings[f"backend_weight{number}"] = 1
            settings[f"backend_data_directory{number}"] = server.data
            settings[f"backend_flag{number}"] = "DISALLOW_TO_FAILOVER"
        write(path("pgpool.conf"), "".join(f"{key} = {quoted(value)}\n" for key, value in settings.items()))
        write(path("pcp.conf"), "")
        command = [binary, "-n", "-D", "-f", path("pgpool.conf"), "-F", path("pcp.conf")]
        self._spawn(as_server_user(command), path("log"))
        self._wait_for_port()


class Crossfade(Contender):
    """The release build, in one phase."""

    protocols = PGBENCH + OWN
    # Further lines of its file.
    more = ""

    def __init__(self, old, new, database, directory, binary, phase):
        super().__init__("crossfade " + phase, database, free_port())
        self.old, self.new, self.directory, self.binary, self.phase = old, new, directory, binary, phase
        self.mirrored = phase != "old"
        self.admin = free_port()
        self.begins = True

    def _write_config(self, phase):
        draft = os.path.join(self.directory, "draft")
        write(draft, f"listen: 127.0.0.1:{self.port}\nadmin: 127.0.0.1:{self.admin}\n{sides(self.old, self.new, self.database)}"
              f"name: {self.database}\nauth: trust\nphase: {phase}\nlimits: {{ clients: {CONNECTIONS + 50} }}\nlog: {{ level: warn }}\n{self.more}")
        os.rename(draft, os.path.join(self.directory, "crossfade.yaml"))

    def start(self):
        os.makedirs(self.directory, exist_ok=True)
        # A migration begins in old; a proxy that is started again finds it where it was.
        self._write_config("old" if self.begins else self.phase)
        config = os.path.join(self.directory, "crossfade.yaml")
        self._spawn([self.binary, "run", "--config", config], os.path.join(self.directory, "log"))
        self._wait_for_port()
        if self.begins:
            self._wait_for_phase("old")
            self._write_config(self.phase)
        self._wait_for_phase(self.phase)
        self.settled()

    def _wait_for_phase(self, phase):
        self._wait_until(f"phase {phase} to hold", lambda gauges: gauges.get(f'crossfade_phase{{phase="{phase}"}}') == 1)

    def settled(self):
        """Nothing owed, nothing in flight; seen three times, since the gauges are renewed once a second."""
        if not self.mirrored:
            return
        for _ in range(3):
            time.sleep(1)
            self._wait_until("the debt to be paid", lambda gauges: debt(gauges) == 0, seconds=900)

    def _wait_until(self, what, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise Failed(f"{self.name} has ended:\n{self._log_tail()}")
            gauges = self.gauges()
            if condition(gauges):
                return
            if time.monotonic() > deadline:
                raise Failed(f"{self.name}: waited in vain for {what} (debt {debt(gauges)}):\n{self._log_tail()}")
            time.sleep(0.1)

    def gauges(self):
        """Every series of /metrics by its whole name."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return {}
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}


class MirrorDown(Crossfade):
    """In dual-write, with its way to new cut when it has got there. `settled` mends it, and waits until all is paid."""

    protocols = OWN

    def __init__(self, old, new, database, directory, binary, relay):
        self.way = RawRelay(new, database, os.path.join(directory, "way"), relay)
        super().__init__(old, self.way, database, directory, binary, "dual-write")
        self.name = "crossfade mirror down"

    def start(self):
        self.way.start()
        super().start()
        self.way.stop()

    def settled(self):
        if self.way.process.poll() is not None:
            self.way.start()
        super().settled()

    def stop(self):
        super().stop()
        self.way.stop()


def make(options, name, old, new, directory):
    """A contender by its name. Those that only write old share a database; those that write both have one each."""
    path = os.path.join(directory, name.replace(" ", "-"))
    makers = {
        "direct": lambda: Direct(old, "single"),
        "raw-relay": lambda: RawRelay(old, "single", path, options.relay),
        "pgbouncer": lambda: PgBouncer(old, "single", path),
        "crossfade old": lambda: Crossfade(old, new, "single", path, options.crossfade, "old"),
        "pgpool": lambda: Pgpool(old, new, "pgpool", path, 64),
        "crossfade dual-write": lambda: Crossfade(old, new, "dual", path, options.crossfade, "dual-write"),
        "crossfade mirror down": lambda: MirrorDown(old, new, "down", path, options.crossfade, options.relay),
        "by hand": lambda: ByHand(old, new, "hand", path, options.relay, options.crossfade),
    }
    return makers[name]()


def debt(gauges):
    """Everything that is not known to be equal on both sides. Infinite where it cannot be known."""
    if not gauges:
        return float("inf")
    names = ("crossfade_debt_keys", "crossfade_debt_in_flight", "crossfade_tainted_tables")
    return sum(value for name, value in gauges.items() if name.split("{")[0] in names)


def sides(old, new, database):
    url = lambda server: f"postgres://postgres@127.0.0.1:{server.port}/{database}"
    return f"old: {url(old)}\nnew: {url(new)}\n"


def quoted(value):
    return f"'{value}'" if isinstance(value, str) else str(value)


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o644)
