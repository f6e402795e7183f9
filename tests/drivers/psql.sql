-- Run by psql -X -a, with errors going on. PIDs and large objects' numbers are taken out of what it prints.
\set VERBOSITY verbose
\set SHOW_CONTEXT always
SELECT current_user, current_database() \gset
\echo :current_user :current_database
INSERT INTO things (name, flag, big, num, bytes, day, stamp, span, doc, tags, state, couple, seen)
VALUES ('psql', true, 9007199254740993, 'NaN', '\x00ff', '2026-02-28', '2026-02-28 12:00:00.123456+02', '1 mon 2 days 03:04:05.6',
        '{"b": [1, null], "a": "ü"}', '{a,"b c",NULL}', 'happy', '(1,"x,y")', '[1,5)') RETURNING id, name, twice, nonce IS NOT NULL;
SELECT * FROM things \gset thing_
\echo :thing_name :thing_num :thing_couple
TABLE places;
-- several statements in one Query, with an error in the second
INSERT INTO places VALUES (1, 'one', 'lost')\; SELECT 1/0\; INSERT INTO places VALUES (2, 'two', 'never');
INSERT INTO places VALUES (1, 'one', 'kept')\; UPDATE places SET v = v || '!' RETURNING *\; DELETE FROM places WHERE a = 9;
SELECT count(*) FROM places;
-- COPY with data in line, both ways
COPY places FROM STDIN;
3	three	\N
4	fo\tur	x
\.
\copy (SELECT * FROM places ORDER BY a) TO STDOUT (FORMAT csv, HEADER, NULL 'none')
COPY events (what) FROM STDIN (FORMAT csv);
a
"b,c"
\.
COPY places FROM STDIN;
3	three	again
\.
SELECT what FROM events ORDER BY what;
-- blocks, savepoints, \gexec, variables
BEGIN;
INSERT INTO places VALUES (5, 'five', 'a');
SAVEPOINT s;
INSERT INTO places VALUES (5, 'five', 'twice');
SELECT 'refused in a failed block';
ROLLBACK TO s;
UPDATE places SET b = 'moved', v = 'b' WHERE a = 5;
COMMIT;
\set ON_ERROR_ROLLBACK on
BEGIN;
INSERT INTO places VALUES (6, 'six', NULL);
INSERT INTO places VALUES (6, 'six', NULL);
INSERT INTO places VALUES (7, 'seven', NULL) ON CONFLICT DO NOTHING;
COMMIT;
\set ON_ERROR_ROLLBACK off
SELECT format('INSERT INTO places VALUES (%s, %L, %L) ON CONFLICT (a, b) DO UPDATE SET v = excluded.v RETURNING *', a, 'gexec', v)
FROM generate_series(10, 12) AS a, (VALUES ('x'), ('y')) AS t (v) ORDER BY a, v \gexec
-- a cursor behind the scenes
\set FETCH_COUNT 3
SELECT n, n * n AS square FROM generate_series(1, 8) AS n;
\unset FETCH_COUNT
-- large objects over the fast path
\lo_import tests/drivers/requirements.txt 'a comment'
SELECT length(lo_get(:LASTOID)) > 0 AS is_there;
\lo_unlink :LASTOID
-- notifications, notices, settings
LISTEN channel;
NOTIFY channel, 'payload';
UNLISTEN channel;
DO $$ BEGIN RAISE NOTICE 'noticed'; RAISE WARNING 'warned' USING HINT = 'h', DETAIL = 'd'; END $$;
SET DateStyle = 'SQL, DMY'; SET TimeZone = 'America/New_York'; SET IntervalStyle = 'sql_standard'; SET bytea_output = 'escape'; SET extra_float_digits = -3;
INSERT INTO things (name, single, double, bytes, day, stamp, span)
VALUES ('settings', 0.1, 1.0 / 3, 'a\\000b', '31/12/2026', '31/12/2026 23:59:59.999999', '1-2 3 4:05:06') RETURNING single, double, bytes, day, stamp, span;
RESET ALL;
SELECT name, single, double, bytes, day, stamp AT TIME ZONE 'UTC' AS stamp, span FROM things WHERE name = 'settings';
\encoding LATIN1
SELECT octet_length('ü'), 'ü' = U&'\00fc' AS read_as_latin1;
\encoding UTF8
PREPARE p (int, text) AS INSERT INTO places VALUES ($1, $2, 'prepared') RETURNING a, b;
EXECUTE p (20, 'p');
EXECUTE p (20, 'p');
DEALLOCATE p;
-- the other ways to write
WITH moved AS (DELETE FROM places WHERE a = 4 RETURNING *) INSERT INTO places SELECT a + 100, b, v FROM moved RETURNING *;
MERGE INTO places AS p USING (VALUES (1, 'one'), (30, 'thirty')) AS n (a, b) ON p.a = n.a AND p.b = n.b
WHEN MATCHED THEN UPDATE SET v = 'merged' WHEN NOT MATCHED THEN INSERT VALUES (n.a, n.b, 'new');
UPDATE places AS p SET v = t.name FROM things AS t WHERE t.name = 'psql' AND p.a = 3 RETURNING p.*, t.id;
DELETE FROM places USING things AS t WHERE places.a = 12 AND t.name = 'psql' RETURNING places.b;
BEGIN; INSERT INTO children VALUES (1, 999); COMMIT;
INSERT INTO children VALUES (2, 1) RETURNING *;
TRUNCATE children;
CREATE TEMP TABLE scratch AS SELECT * FROM places; SELECT count(*) FROM scratch; DROP TABLE scratch;
\d places
SELECT * FROM places ORDER BY a, b COLLATE "C", v;
\errverbose
