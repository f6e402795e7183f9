"""One run of pgbench with the CPU of the proxy's processes beside it, and the memory of idle connections."""

import os
import re
import socket
import struct
import subprocess
import time

from clusters import Failed, program

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


def pgbench(contender, workload, clients, protocol, seconds, seed):
    """One run. A dict with tps, transactions, latency_ms, cpu_us_per_tx (None without a proxy), or with error."""
    command = [program("pgbench"), "-n", "-h", "127.0.0.1", "-p", str(contender.port), "-U", "postgres", "-c", str(clients)]
    command += ["-j", str(min(clients, os.cpu_count() or 1)), "-T", str(seconds), "-M", protocol, f"--random-seed={seed}"]
    command += ["-b", "select-only" if workload == "select" else "tpcb-like", contender.database]
    root = contender.process.pid if contender.process else None
    before = cpu_us(root) if root else 0
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        return {"error": f"pgbench did not end {60} s after its time"}
    used = cpu_us(root) - before if root else None
    said = done.stdout
    # Up to PostgreSQL 13: "(excluding connections establishing)".
    tps = re.search(r"tps = ([\d.]+) \((?:without initial|excluding)", said)
    transactions = re.search(r"transactions actually processed: (\d+)", said)
    if done.returncode != 0 or not tps or not transactions or int(transactions[1]) == 0:
        complaint = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
        return {"error": (complaint or done.stderr.splitlines() or [f"pgbench ended with {done.returncode}"])[0]}
    failed = re.search(r"number of failed transactions: (\d+)", said)
    latency = re.search(r"latency average = ([\d.]+) ms", said)
    count = int(transactions[1])
    return {
        "tps": float(tps[1]), "transactions": count, "failed": int(failed[1]) if failed else 0,
        "latency_ms": float(latency[1]) if latency else None, "cpu_us_per_tx": used / count if root else None,
    }


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
