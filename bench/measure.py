"""One run of pgbench or of our own generator, with the CPU of all who take part beside it; and the memory of idle connections."""

import os
import re
import resource
import socket
import struct
import subprocess
import time

from clusters import Failed, program

# pgbench's scripts of each workload; of ten transactions of `mixed` nine only read.
SCRIPTS = {"select": ["select-only"], "tpcb": ["tpcb-like"], "update": ["simple-update"], "mixed": ["select-only@9", "simple-update@1"]}

TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")


def stat_fields(pid):
    """The fields of /proc/PID/stat behind the command's name, which may hold spaces: [0] is field 3. None: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def family(root):
    """A process and all its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = stat_fields(entry)
            if fields:
                parents.setdefault(int(fields[1]), []).append(int(entry))
    found, left = [], [root]
    while left:
        pid = left.pop()
        found.append(pid)
        left += parents.get(pid, [])
    return found


def cpu_us(root):
    """User and system time of all threads of a process and its descendants, those included that have ended and been
    waited for, in microseconds."""
    ticks = 0
    for pid in family(root):
        fields = stat_fields(pid)
        if fields:
            ticks += sum(int(field) for field in fields[11:15])
    return ticks * TICK_US


def memory_kib(root):
    """Proportional set size: pages shared by several processes are counted once."""
    total = 0
    for pid in family(root):
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total


class Cpu:
    """What a run takes: user and system time in microseconds of the proxy, of both servers and of the client program, which must
    have ended when it is read."""

    def __init__(self, contender, servers):
        self.roots = {server.name: server.pid() for server in servers}
        if contender.process:
            self.roots["proxy"] = contender.process.pid
        self.before = self._now()

    def _now(self):
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"client": (children.ru_utime + children.ru_stime) * 1e6, **{name: cpu_us(root) for name, root in self.roots.items()}}

    def each(self, transactions):
        """For one transaction, by who took it."""
        return {name: (now - self.before[name]) / transactions for name, now in self._now().items()}


def run_client(command, seconds):
    """A client program that runs for so long: its end, or what to say of it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        return None, f"{os.path.basename(command[0])} did not end {60} s after its time"
    if done.returncode == 0:
        return done, None
    complaint = [line for line in done.stderr.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
    return None, (complaint or done.stderr.splitlines() or [f"{command[0]} ended with {done.returncode}"])[0]


def figures(tps, latency_ms, transactions, cpu):
    each = cpu.each(transactions)
    return {"tps": tps, "transactions": transactions, "latency_ms": latency_ms, "cpu_us": each, "cpu_us_per_tx": each.get("proxy")}


def pgbench(contender, servers, workload, clients, protocol, seconds, seed):
    """One run. A dict with tps, transactions, latency_ms, cpu_us by who takes it, cpu_us_per_tx (the proxy's, None without one), or with error."""
    command = [program("pgbench"), "-n", "-h", "127.0.0.1", "-p", str(contender.port), "-U", "postgres", "-c", str(clients)]
    command += ["-j", str(min(clients, os.cpu_count() or 1)), "-T", str(seconds), "-M", protocol, f"--random-seed={seed}"]
    command += [word for script in SCRIPTS[workload] for word in ("-b", script)] + [contender.database]
    cpu = Cpu(contender, servers)
    done, error = run_client(command, seconds)
    if error:
        return {"error": error}
    # Up to PostgreSQL 13: "(excluding connections establishing)".
    tps = re.search(r"tps = ([\d.]+) \((?:without initial|excluding)", done.stdout)
    transactions = re.search(r"transactions actually processed: (\d+)", done.stdout)
    if not tps or not transactions or int(transactions[1]) == 0:
        return {"error": "pgbench gives no figures"}
    failed = re.search(r"number of failed transactions: (\d+)", done.stdout)
    latency = re.search(r"latency average = ([\d.]+) ms", done.stdout)
    found = figures(float(tps[1]), float(latency[1]) if latency else None, int(transactions[1]), cpu)
    return {**found, "failed": int(failed[1]) if failed else 0}


def own(contender, servers, generator, workload, clients, seconds, seed):
    """One run of bench/by_hand, as `pgbench`; also p50_ms and p99_ms."""
    command = [generator, "--database", contender.database, "--workload", workload, "--clients", str(clients)]
    command += ["--seconds", str(seconds), "--seed", str(seed)] + contender.addresses()
    cpu = Cpu(contender, servers)
    done, error = run_client(command, seconds)
    if error:
        return {"error": error}
    said = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    found = figures(said["tps"], said["mean_us"] / 1000, int(said["transactions"]), cpu)
    return {**found, "p50_ms": said["p50_us"] / 1000, "p99_ms": said["p99_us"] / 1000}


def receive(connection, size):
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise Failed("the connection was closed")
        data += more
    return data


def until_ready(connection):
    """Reads messages up to ReadyForQuery."""
    while True:
        head = receive(connection, 5)
        body = receive(connection, struct.unpack("!I", head[1:])[0] - 4)
        if head[:1] == b"E":
            raise Failed(body.replace(b"\0", b" ").decode(errors="replace"))
        if head[:1] == b"Z":
            return


def open_idle(port, database):
    """A connection that has run one statement and does nothing more."""
    connection = socket.create_connection(("127.0.0.1", port), 30)
    body = struct.pack("!I", 196608) + b"user\0postgres\0database\0" + database.encode() + b"\0\0"
    connection.sendall(struct.pack("!I", len(body) + 4) + body)
    until_ready(connection)
    query = b"SELECT aid FROM pgbench_accounts WHERE aid = 1\0"
    connection.sendall(b"Q" + struct.pack("!I", len(query) + 4) + query)
    until_ready(connection)
    return connection


def idle_memory(contender, connections):
    """Memory of the proxy without clients and with idle ones, in KiB."""
    held = []
    try:
        held.append(open_idle(contender.port, contender.database))
        time.sleep(1)
        before = memory_kib(contender.process.pid)
        held += [open_idle(contender.port, contender.database) for _ in range(connections)]
        time.sleep(1)
        after = memory_kib(contender.process.pid)
    finally:
        for connection in held:
            connection.close()
    return {"connections": connections, "before_kib": before, "with_kib": after, "per_connection_kib": (after - before) / connections}
