"""asyncpg: what an application does with it. Prints a transcript without anything that differs from run to run."""

import asyncio
import datetime as dt
import decimal
import hashlib
import io
import json
import os
import uuid

import asyncpg

DSN = os.environ["CROSSFADE_TEST_DSN"]


def say(label, *values):
    print(f"{label}:", *(repr(value) for value in values), flush=True)


async def attempt(label, work):
    try:
        say(label, await work)
    except asyncpg.PostgresError as error:
        say(label, type(error).__name__, error.sqlstate, error.message, error.detail, error.constraint_name)


def plain(records):
    return [tuple(record) for record in records]


async def types(conn):
    columns = ["flag", "small", "big", "num", "single", "double", "bytes", "day", "stamp", "span", "uid", "doc", "tags",
               "nums", "state", "states", "couple", "pos", "seen"]
    values = [True, 7, -(2**62), decimal.Decimal("1e-20"), 0.5, 1 / 3, bytes(range(256)), dt.date(1, 1, 1),
              dt.datetime(2026, 10, 25, 1, 0, 0, 1, tzinfo=dt.timezone.utc), dt.timedelta(days=40, seconds=1),
              uuid.UUID(int=9), {"k": [1, None, "ü"]}, ["a", None, 'q"'], [[1, 2], [3, None]], "happy", ["sad", "ok"],
              (1, "x,y"), 5, asyncpg.Range(1, 9, upper_inc=False)]
    await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    places = ", ".join(f"${n + 2}" for n in range(len(columns)))
    query = f"INSERT INTO things (name, {', '.join(columns)}) VALUES ($1, {places}) RETURNING {', '.join(columns)}, twice"
    say("types", tuple(await conn.fetchrow(query, "types", *values)))
    say("infinity", await conn.fetchval("SELECT 'infinity'::timestamptz"), await conn.fetchval("SELECT 'NaN'::numeric"))
    await attempt("domain", conn.execute("UPDATE things SET pos = $1", -1))
    text = "é" * 1_000_000
    await conn.execute("INSERT INTO things (name, bytes) VALUES ('long', $1)", text.encode())
    say("long", hashlib.md5(await conn.fetchval("SELECT bytes FROM things WHERE name = 'long'")).hexdigest())


async def prepared(conn):
    insert = await conn.prepare("INSERT INTO places VALUES ($1, $2, $3) RETURNING *")
    say("parameters", [kind.name for kind in insert.get_parameters()], [column.name for column in insert.get_attributes()])
    for n in range(5):
        say("prepared", tuple(await insert.fetchrow(n, "prepared", str(n))), insert.get_statusmsg())
    await attempt("again", insert.fetchrow(1, "prepared", "again"))
    say("executemany", await insert.executemany([(n, "many", None) for n in range(500)]))
    say("fetchmany", len(await conn.fetch("SELECT * FROM places WHERE b = $1", "many")))
    await attempt("executemany is all or nothing", conn.executemany("INSERT INTO places VALUES ($1, 'nothing', '')", [(1,), (2,), (1,)]))
    say("nothing", await conn.fetchval("SELECT count(*) FROM places WHERE b = 'nothing'"))
    for n in range(150):  # more than the driver's cache of statements holds
        await conn.fetchval(f"SELECT {n} + $1::int", 1)
    say("tags", await conn.execute("UPDATE places SET v = 'u' WHERE a < 3"), await conn.execute("DELETE FROM places WHERE a = 2"))
    script = "INSERT INTO places VALUES (70, 'script', 'a'); UPDATE places SET v = 'b' WHERE a = 70; SELECT 1"
    say("script", await conn.execute(script))
    await attempt("a script that fails", conn.execute("INSERT INTO places VALUES (71, 'script', ''); SELECT 1/0"))


async def copy(conn):
    records = [(n, "records", None if n % 5 == 0 else f"v\t{n}") for n in range(2_000)]
    say("records", await conn.copy_records_to_table("places", records=records))
    out = io.BytesIO()
    say("query", await conn.copy_from_query("SELECT * FROM places WHERE b = $1 ORDER BY a", "records", output=out, format="csv"))
    say("csv", hashlib.md5(out.getvalue()).hexdigest())
    say("table", await conn.copy_to_table("events", source=io.BytesIO(b"x\ny\n"), columns=["what"], format="csv"))
    binary = io.BytesIO()
    await conn.copy_from_table("places", columns=["a"], output=binary, format="binary")
    say("binary", len(binary.getvalue()))
    await attempt("a key that is there", conn.copy_records_to_table("places", records=records[:3]))

    async def breaks():
        yield b"9000,breaks,x\n"
        raise ZeroDivisionError

    try:
        await conn.copy_to_table("places", source=breaks(), format="csv")
    except ZeroDivisionError:
        say("broken off", await conn.fetchval("SELECT count(*) FROM places WHERE b = 'breaks'"))


async def cursors(conn):
    async with conn.transaction():
        seen = [record["a"] async for record in conn.cursor("SELECT a FROM places WHERE b = 'records' ORDER BY a", prefetch=7)]
        say("cursor", len(seen), sum(seen))
        cursor = await conn.cursor("SELECT a FROM places WHERE b = $1 ORDER BY a", "records")
        say("portal", plain(await cursor.fetch(3)), await cursor.forward(10), tuple(await cursor.fetchrow()))


async def transactions(conn):
    async with conn.transaction():
        await conn.execute("INSERT INTO places VALUES (80, 'tx', 'outer')")
        try:
            async with conn.transaction():
                await conn.execute("UPDATE places SET v = 'inner' WHERE a = 80")
                await conn.execute("INSERT INTO places VALUES (80, 'tx', 'twice')")
        except asyncpg.UniqueViolationError as error:
            say("savepoint", error.constraint_name)
    say("outer", await conn.fetchval("SELECT v FROM places WHERE a = 80 AND b = 'tx'"))
    for isolation in ("read_committed", "repeatable_read", "serializable"):
        async with conn.transaction(isolation=isolation):
            await conn.execute("UPDATE places SET v = $1 WHERE a = 80 AND b = 'tx'", isolation)
            say(isolation, await conn.fetchval("SHOW transaction_isolation"))
    async def read_only():
        async with conn.transaction(readonly=True):
            await conn.execute("DELETE FROM places")
    await attempt("read only", read_only())
    transaction = conn.transaction()
    await transaction.start()
    await conn.execute("DELETE FROM places")
    await transaction.rollback()
    say("rolled back", await conn.fetchval("SELECT count(*) > 0 FROM places"))


async def messages(conn):
    logged, heard = [], asyncio.Queue()
    conn.add_log_listener(lambda _, message: logged.append((message.severity, message.message)))
    await conn.execute("DO $$ BEGIN RAISE NOTICE 'n'; RAISE WARNING 'w'; END $$")
    say("notices", logged)
    other = await asyncpg.connect(DSN)
    pids = {conn.get_server_pid(): "mine", other.get_server_pid(): "theirs"}
    say("pid", await conn.fetchval("SELECT pg_backend_pid()") == conn.get_server_pid())
    listener = lambda _, pid, channel, payload: heard.put_nowait((pids.get(pid), channel, payload))
    await conn.add_listener("channel", listener)
    await conn.execute("NOTIFY channel, 'a'")
    say("mine", await asyncio.wait_for(heard.get(), 20))
    await other.execute("NOTIFY channel, 'b'")
    say("theirs", await asyncio.wait_for(heard.get(), 20))
    await conn.remove_listener("channel", listener)
    await other.close()


async def cancel(conn):
    try:
        await conn.execute("SELECT pg_sleep(60)", timeout=0.3)
    except asyncio.TimeoutError:
        say("cancelled by a timeout", await conn.fetchval("SELECT 1"))


async def pool():
    async with asyncpg.create_pool(DSN, min_size=2, max_size=4) as connections:
        async def work(n):
            async with connections.acquire() as conn:
                await conn.execute("SET application_name = 'leaks'")
                await conn.execute("SELECT pg_advisory_lock($1)", n)
                async with conn.transaction():
                    await conn.execute("INSERT INTO places VALUES ($1, 'pool', $2)", n, str(n))
                    await conn.execute("UPDATE places SET v = v || '!' WHERE a = $1 AND b = 'pool'", n)
        await asyncio.gather(*(work(n) for n in range(40)))
        async with connections.acquire() as conn:
            # The driver's reset query has run: UNLISTEN, RESET ALL, pg_advisory_unlock_all(), CLOSE ALL.
            locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 0 AND objid < 40 AND granted"
            say("reset", await conn.fetchval("SHOW application_name"), await conn.fetchval(locks))
            say("pool", await conn.fetchval("SELECT count(*) FROM places WHERE b = 'pool' AND v LIKE '%!'"))


async def main():
    conn = await asyncpg.connect(DSN, server_settings={"application_name": "crossfade test"})
    say("settings", conn.get_settings().server_encoding, conn.get_settings().application_name, conn.get_server_version().major)
    for section in (types, prepared, copy, cursors, transactions, messages, cancel):
        print(f"== {section.__name__}", flush=True)
        await section(conn)
    await conn.reset()
    await conn.close()
    print("== pool", flush=True)
    await pool()
    try:
        await asyncpg.connect(DSN, password="wrong")
    except asyncpg.PostgresError as error:
        say("wrong password", error.sqlstate, error.message)
    conn = await asyncpg.connect(DSN)
    say("at the end", plain(await conn.fetch('SELECT b, count(*) FROM places GROUP BY b ORDER BY b COLLATE "C"')))
    await conn.close()


asyncio.run(main())
