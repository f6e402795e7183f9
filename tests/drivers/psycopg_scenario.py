"""psycopg 3: what an application does with it. Prints a transcript without anything that differs from run to run."""

import asyncio
import datetime as dt
import decimal
import hashlib
import ipaddress
import os
import threading
import time
import uuid

import psycopg
from psycopg.types.json import Jsonb
from psycopg.types.range import Range

DSN = os.environ["CROSSFADE_TEST_DSN"]


def say(label, *values):
    print(f"{label}:", *(repr(value) for value in values), flush=True)


def attempt(label, work):
    """Runs something that may fail and says how it went."""
    try:
        say(label, work())
    except psycopg.Error as error:
        diag = error.diag
        say(label, type(error).__name__, error.sqlstate, diag.message_primary, diag.message_detail, diag.message_hint,
            diag.schema_name, diag.table_name, diag.column_name, diag.constraint_name)


def rows(conn, query, params=None, **options):
    cursor = conn.execute(query, params, **options)
    return cursor.fetchall() if cursor.description else cursor.statusmessage


def login(conn):
    names = ["server_encoding", "client_encoding", "DateStyle", "TimeZone", "integer_datetimes",
             "standard_conforming_strings", "is_superuser", "session_authorization", "IntervalStyle", "in_hot_standby",
             "default_transaction_read_only", "application_name", "server_version"]
    say("parameters", {name: conn.info.parameter_status(name) for name in names})
    say("pid", rows(conn, "SELECT pg_backend_pid()")[0][0] == conn.info.backend_pid)
    say("status", conn.info.transaction_status.name, conn.info.server_version)


VALUES = {
    "flag": True, "small": -32768, "big": 2**61, "num": decimal.Decimal("-12345678901234567890.000100"),
    "single": 0.1, "double": 1 / 3, "bytes": bytes(range(256)), "day": dt.date(2024, 2, 29),
    "stamp": dt.datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=dt.timezone.utc),
    "span": dt.timedelta(days=-3, microseconds=7), "uid": uuid.UUID(int=7), "doc": Jsonb({"k": [1, None, "ü"]}),
    "tags": ["a", 'b"c', None, "{}"], "nums": [1, None, -3], "seen": Range(1, 5), "addr": ipaddress.ip_address("::1"),
}
COLUMNS = ", ".join(VALUES)


def types(conn):
    for binary in (False, True):
        style = "%b" if binary else "%t"
        placeholders = ", ".join("%s" if name == "small" else style for name in VALUES)
        query = f"INSERT INTO things (name, {COLUMNS}) VALUES (%s, {placeholders}) RETURNING {COLUMNS}, twice"
        for prepare in (False, True, True):
            name = f"types {binary} {prepare} {time.monotonic_ns()}"
            cursor = conn.cursor(binary=binary)
            cursor.execute(query, [name, *VALUES.values()], prepare=prepare)
            say(f"types binary={binary} prepare={prepare}", cursor.fetchone(), cursor.statusmessage, cursor.rowcount)
            say("formats", sorted({column.type_code for column in cursor.description if column.type_code < 10_000}))
            conn.execute("UPDATE things SET name = 'types ' || id WHERE name = %s", [name])
    say("enums", rows(conn, "INSERT INTO things (name, state, states, couple, pos) VALUES ('enum', 'ok', '{sad,happy}', "
                            "ROW(1, 'x'), 3) RETURNING state, states, couple, pos"))
    attempt("domain", lambda: rows(conn, "UPDATE things SET pos = -1 WHERE name = 'enum'"))
    conn.rollback()
    say("infinities", rows(conn, "SELECT 'NaN'::float8, '-infinity'::float8, 'NaN'::numeric, 'infinity'::timestamptz::text"))
    text = "ü" * 1_000_000
    conn.execute("INSERT INTO things (name, bytes, tags) VALUES ('long', %b, %s)", [text.encode(), [text]])
    stored = rows(conn, "SELECT bytes, tags FROM things WHERE name = 'long'")[0]
    say("long", hashlib.md5(stored[0]).hexdigest(), stored[1] == [text])
    conn.commit()


def many(conn):
    with conn.cursor() as cursor:
        cursor.executemany("INSERT INTO places VALUES (%s, %s, %s)", [(n, "many", str(n)) for n in range(300)])
        say("executemany", cursor.rowcount)
        cursor.executemany("UPDATE places SET v = v || '+' WHERE a = %s RETURNING a, v", [(n,) for n in range(5)], returning=True)
        results = [cursor.fetchall()]
        while cursor.nextset():
            results.append(cursor.fetchall())
        say("executemany returning", results)
    conn.commit()


def pipeline(conn):
    with conn.pipeline() as pipe:
        cursors = [conn.execute("INSERT INTO places VALUES (%s, 'pipe', NULL) RETURNING a", [n]) for n in range(20)]
        count = conn.execute("SELECT count(*) FROM places WHERE b = 'pipe'")
        pipe.sync()
        say("pipeline", [cursor.fetchone()[0] for cursor in cursors], count.fetchone())
    conn.commit()

    def failing():
        with conn.pipeline():
            conn.execute("INSERT INTO places VALUES (900, 'pipe', 'lost')")
            conn.execute("SELECT 1/0")
            conn.execute("INSERT INTO places VALUES (901, 'pipe', 'never')")

    attempt("pipeline with an error", failing)
    say("after it", conn.info.transaction_status.name)
    conn.rollback()
    say("nothing of it", rows(conn, "SELECT count(*) FROM places WHERE a >= 900"))
    conn.commit()
    with conn.pipeline() as pipe:
        with conn.transaction():
            conn.execute("INSERT INTO places VALUES (910, 'pipe', 'block')")
            with conn.transaction():
                conn.execute("UPDATE places SET v = 'nested' WHERE a = 910")
        try:
            with conn.transaction():
                conn.execute("DELETE FROM places WHERE b = 'pipe'")
                raise psycopg.Rollback()
        except psycopg.Rollback:
            pass
    say("blocks in a pipeline", rows(conn, "SELECT v FROM places WHERE a = 910"))
    conn.commit()
    conn.autocommit = True
    with conn.pipeline() as pipe:
        first = conn.execute("INSERT INTO places VALUES (920, 'auto', 'a') RETURNING v")
        pipe.sync()
        second = conn.execute("UPDATE places SET v = 'b' WHERE a = 920 RETURNING v")
        pipe.sync()
        third = conn.execute("DELETE FROM places WHERE a = 920 RETURNING v")
        say("autocommit pipeline", first.fetchone(), second.fetchone(), third.fetchone())
    conn.autocommit = False


def copy(conn):
    data = [(n, "copy", None if n % 7 == 0 else f"tab\t newline\n {n}") for n in range(1_000)]
    for binary in (False, True):
        options = "(FORMAT binary)" if binary else ""
        with conn.cursor() as cursor:
            cursor.execute("DELETE FROM places WHERE b = 'copy'")
            with cursor.copy(f"COPY places (a, b, v) FROM STDIN {options}") as stream:
                if binary:
                    stream.set_types(["int4", "text", "text"])
                for row in data:
                    stream.write_row(row)
            say(f"copy in binary={binary}", cursor.rowcount, cursor.statusmessage)
            with cursor.copy(f"COPY (SELECT a, b, v FROM places WHERE b = 'copy' ORDER BY a) TO STDOUT {options}") as stream:
                stream.set_types(["int4", "text", "text"])
                say("copy out", hashlib.md5(repr(list(stream.rows())).encode()).hexdigest())
    conn.commit()

    def abandoned():
        with conn.cursor().copy("COPY places FROM STDIN") as stream:
            stream.write_row((5_000, "abandoned", ""))
            raise ZeroDivisionError

    try:
        abandoned()
    except ZeroDivisionError:
        say("copy abandoned", conn.info.transaction_status.name)
    conn.rollback()

    def twice():
        with conn.cursor().copy("COPY places FROM STDIN") as stream:
            stream.write("1\tcopy\tx\n")

    attempt("copy of a key that is there", twice)
    conn.rollback()
    with conn.cursor().copy("COPY events (what) FROM STDIN") as stream:
        stream.write("one\ntwo\n")
    conn.commit()


def cursors(conn):
    for binary in (False, True):
        with conn.cursor("named", binary=binary, scrollable=True) as cursor:
            cursor.itersize = 10
            cursor.execute("SELECT a, v FROM places WHERE b = 'copy' ORDER BY a LIMIT 35")
            head = cursor.fetchmany(3)
            cursor.scroll(-1)
            say("named cursor", head, cursor.fetchone(), len([row for row in cursor]))
    held = conn.cursor("held", withhold=True)
    held.execute("SELECT a FROM places WHERE b = 'pipe' ORDER BY a")
    conn.commit()
    say("held cursor", held.fetchmany(2))
    held.close()
    conn.commit()
    with psycopg.ClientCursor(conn) as cursor:
        cursor.execute("SELECT %s, %s; SELECT 2; INSERT INTO places VALUES (30, 'multi', '%%') RETURNING v", ["it's", 1])
        results = [cursor.fetchall()]
        while cursor.nextset():
            results.append(cursor.fetchall())
        say("several statements", results)
    conn.commit()
    say("stream", [row[0] for row in conn.cursor().stream("SELECT generate_series(1, 5)")])
    conn.commit()


def prepared(conn):
    conn.prepare_threshold = 0
    for n in range(4):
        say("prepared", rows(conn, "UPDATE places SET v = %s WHERE a = %s AND b = 'many' RETURNING v", [f"p{n}", n]))
    say("names", len(rows(conn, "SELECT name FROM pg_prepared_statements")) > 0)
    conn.commit()
    conn.execute("DEALLOCATE ALL")
    say("again", rows(conn, "UPDATE places SET v = %s WHERE a = %s AND b = 'many' RETURNING v", ["again", 1]))
    conn.commit()
    conn.prepare_threshold = 5


def transactions(conn):
    with conn.transaction():
        conn.execute("INSERT INTO places VALUES (40, 'tx', 'kept')")
        try:
            with conn.transaction():
                conn.execute("INSERT INTO places VALUES (41, 'tx', 'lost')")
                conn.execute("INSERT INTO places VALUES (40, 'tx', 'twice')")
        except psycopg.errors.UniqueViolation as error:
            say("savepoint", error.diag.constraint_name, error.diag.message_detail)
        conn.execute("INSERT INTO places VALUES (42, 'tx', 'kept')")
    say("kept", rows(conn, "SELECT a FROM places WHERE b = 'tx' ORDER BY a"))
    conn.commit()
    for level in psycopg.IsolationLevel:
        conn.isolation_level = level
        conn.execute("UPDATE places SET v = %s WHERE a = 40 AND b = 'tx'", [level.name])
        say("level", rows(conn, "SHOW transaction_isolation"), rows(conn, "SELECT v FROM places WHERE a = 40 AND b = 'tx'"))
        conn.commit()
    conn.isolation_level = None
    conn.read_only = True
    attempt("read only", lambda: rows(conn, "DELETE FROM places"))
    conn.rollback()
    conn.read_only = None
    conn.execute("INSERT INTO children VALUES (1, 123456)")
    attempt("deferred to COMMIT", conn.commit)
    attempt("in a failed block", lambda: (attempt("error", lambda: rows(conn, "SELECT nosuch")), rows(conn, "SELECT 1")))
    conn.rollback()


def messages(conn):
    heard = []
    conn.add_notice_handler(lambda diag: heard.append((diag.severity, diag.message_primary, diag.message_hint)))
    conn.execute("DO $$ BEGIN RAISE NOTICE 'n'; RAISE WARNING 'w' USING HINT = 'h'; END $$")
    conn.commit()
    say("notices", heard)
    conn.autocommit = True
    conn.execute("LISTEN channel")
    conn.execute("NOTIFY channel, 'mine'")
    with psycopg.connect(DSN, autocommit=True) as other:
        other.execute("SELECT pg_notify('channel', 'theirs')")
        pids = {conn.info.backend_pid: "mine", other.info.backend_pid: "theirs"}
        got = [(n.channel, n.payload, pids.get(n.pid)) for n in conn.notifies(timeout=20, stop_after=2)]
    say("notifications", got)
    conn.execute("UNLISTEN *")
    conn.autocommit = False


def cancel(conn):
    def later():
        with psycopg.connect(DSN, autocommit=True) as other:
            while not rows(other, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND usename = user"):
                time.sleep(0.02)
        conn.cancel()

    thread = threading.Thread(target=later)
    thread.start()
    conn.execute("INSERT INTO places VALUES (50, 'cancel', 'lost')")
    attempt("cancelled", lambda: rows(conn, "SELECT pg_sleep(60)"))
    thread.join()
    conn.rollback()
    say("usable", rows(conn, "SELECT count(*) FROM places WHERE b = 'cancel'"))
    conn.commit()


def large_objects(conn):
    number = rows(conn, "SELECT lo_from_bytea(0, %b)", [b"\0large\xff" * 1000])[0][0]
    rows(conn, "SELECT lo_put(%s, 3, %b)", [number, b"PUT"])
    say("large object", hashlib.md5(rows(conn, "SELECT lo_get(%s)", [number])[0][0]).hexdigest())
    say("unlinked", rows(conn, "SELECT lo_unlink(%s)", [number]))
    conn.commit()


async def asynchronous():
    async with await psycopg.AsyncConnection.connect(DSN) as conn:
        cursor = await conn.execute("INSERT INTO places VALUES (60, 'async', 'x') RETURNING *")
        say("asynchronous", await cursor.fetchone())


def main():
    with psycopg.connect(DSN) as conn:
        for section in (login, types, many, pipeline, copy, cursors, prepared, transactions, messages, cancel, large_objects):
            print(f"== {section.__name__}", flush=True)
            section(conn)
    asyncio.run(asynchronous())
    with psycopg.connect(DSN, options="-c timezone=Asia/Kolkata", application_name="crossfade test") as conn:
        say("options", rows(conn, "SELECT current_setting('timezone'), current_setting('application_name')"))
    attempt("wrong password", lambda: psycopg.connect(DSN, password="wrong").close())
    with psycopg.connect(DSN) as conn:
        say("at the end", rows(conn, "SELECT b, count(*) FROM places GROUP BY b ORDER BY b COLLATE \"C\""))


main()
