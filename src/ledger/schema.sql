-- Schema crossfade, the same on both sides. Every statement may be run again.
CREATE SCHEMA IF NOT EXISTS crossfade;

-- One random uuid. PostgreSQL empties an unlogged table in crash recovery and at promotion, and keeps it in a clean restart.
CREATE UNLOGGED TABLE IF NOT EXISTS crossfade.incarnation (id uuid NOT NULL);

-- A commit that wrote nothing flushes nothing: the flushing transaction writes here.
CREATE TABLE IF NOT EXISTS crossfade.flush (one boolean PRIMARY KEY DEFAULT true CHECK (one), n bigint NOT NULL) WITH (fillfactor = 10);
INSERT INTO crossfade.flush (n) VALUES (0) ON CONFLICT DO NOTHING;

-- What holds now. Believed only on the side that it names as authority.
CREATE TABLE IF NOT EXISTS crossfade.migration (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    name text NOT NULL,
    epoch bigint NOT NULL,
    phase text NOT NULL,
    authority text NOT NULL,
    changed timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS crossfade.history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    epoch bigint NOT NULL,
    event text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}'
);

-- An epoch of a phase with a mirror is an empty table crossfade.epoch_<n>, on both sides: each transaction that may write holds its ACCESS SHARE
-- lock, and whoever moves takes it alone. Made only while the row has not passed it, and dropped in the transaction that writes a later row.
CREATE OR REPLACE FUNCTION crossfade.open_epoch(n bigint) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF to_regclass('crossfade.epoch_' || n) IS NOT NULL THEN
        RETURN;
    END IF;
    LOCK TABLE crossfade.migration IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM crossfade.migration WHERE epoch > n) THEN
        RAISE EXCEPTION 'epoch % of this migration is over', n USING ERRCODE = 'undefined_table';
    END IF;
    EXECUTE format('CREATE TABLE IF NOT EXISTS crossfade.epoch_%s ()', n);
    -- For `note_ddl`. (A SET clause of the function would need a superuser.)
    PERFORM set_config('crossfade.installing', 'on', true);
    EXECUTE format('GRANT SELECT ON crossfade.epoch_%s TO PUBLIC', n);
    PERFORM set_config('crossfade.installing', 'off', true);
END $$;

-- Waits for whoever holds an epoch before this one, and ends it.
CREATE OR REPLACE FUNCTION crossfade.close_epochs(before bigint) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    epoch_table regclass;
BEGIN
    FOR epoch_table IN SELECT oid FROM pg_class WHERE relnamespace = 'crossfade'::regnamespace
        AND relname ~ '^epoch_[0-9]+$' AND substr(relname, 7)::bigint < before
    LOOP
        EXECUTE format('DROP TABLE %s', epoch_table);
    END LOOP;
END $$;

-- Relation crossfade.fenced is there where the side is not the authority, in the transaction that writes the row: see src/migrate/fence.rs. `known`: the
-- epoch in which that is so; where a later one holds, its mover has seen to it.
CREATE OR REPLACE FUNCTION crossfade.fence_side(known bigint, up boolean) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF up = (to_regclass('crossfade.fenced') IS NOT NULL) THEN
        RETURN;
    END IF;
    LOCK TABLE crossfade.migration IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM crossfade.migration WHERE epoch > known) THEN
        RETURN;
    ELSIF up THEN
        CREATE TABLE IF NOT EXISTS crossfade.fenced ();
    ELSE
        DROP TABLE IF EXISTS crossfade.fenced;
    END IF;
END $$;

-- What a write around the proxies is told there. The triggers are made by src/migrate/fence.rs, where the file says `fence: true`.
CREATE OR REPLACE FUNCTION crossfade.fence() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    side text;
    held text;
BEGIN
    SELECT authority, phase INTO side, held FROM crossfade.migration;
    RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
        MESSAGE = format('crossfade: %s on table %I.%I went around the proxy, and this database is not the authority (that is %s, in phase %s)',
            TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME, coalesce(side, 'old'), coalesce(held, 'old')),
        HINT = 'Nothing was written. Connect to the proxy instead. Who must write here all the same sets session_replication_role = replica, and lets `crossfade verify` compare afterwards.';
END $$;

-- Proxies, and the server sessions of each; on the side that is authority. `pid`, `start`: the connection that stands for the proxy. `heard`, `still`: the
-- epoch whose end it has heard of, and of which it has no transaction under way and begins none. Nothing here outlives a crash, nor need it.
CREATE UNLOGGED TABLE IF NOT EXISTS crossfade.proxies (
    id text PRIMARY KEY,
    listen text NOT NULL,
    pid integer NOT NULL,
    start timestamptz,
    heard bigint,
    still bigint
);
CREATE UNLOGGED TABLE IF NOT EXISTS crossfade.sessions (pid integer PRIMARY KEY, start timestamptz, proxy text NOT NULL);

-- A move out of a phase without a mirror that is about to begin, as long as this backend lives.
CREATE UNLOGGED TABLE IF NOT EXISTS crossfade.announced (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    phase text NOT NULL,
    pid integer NOT NULL,
    start timestamptz,
    proxy text NOT NULL
);

-- A change of the authority that is about to come, as long as this backend lives: sessions log in on the other side beforehand. See src/switch/ahead.rs.
CREATE UNLOGGED TABLE IF NOT EXISTS crossfade.coming (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    side text NOT NULL,
    pid integer NOT NULL,
    start timestamptz,
    proxy text NOT NULL
);

-- The migrating tables by number. A number is never used again.
CREATE TABLE IF NOT EXISTS crossfade.tables (
    number integer PRIMARY KEY,
    old_schema text NOT NULL,
    old_name text NOT NULL,
    new_schema text NOT NULL,
    new_name text NOT NULL,
    UNIQUE (old_schema, old_name)
);

-- Debts, on the authority, written in the transaction that owes them. `debts`: see src/ledger/debts.rs.
-- carrier_*: the transaction on the mirror that carries the images; its xid is null where they were given up.
-- holder_*: a backend of the authority that may still be adding to this debt (statements that cannot be wrapped).
-- Their numbers are drawn by the proxies, in blocks of 2^32 from this sequence: nextval in a client's session would change its lastval().
CREATE SEQUENCE IF NOT EXISTS crossfade.ledger_id;
CREATE TABLE IF NOT EXISTS crossfade.ledger (
    id bigint PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    carrier_xid bigint,
    carrier_pid integer,
    carrier_start bigint,
    carrier_incarnation uuid,
    holder_pid integer,
    holder_start bigint,
    debts bytea NOT NULL,
    reason text,
    error text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 1000000);
-- Any role's transaction may owe: see src/ledger/owe.rs.

-- On the mirror: tokens of transactions that inserted into tables without a key, so that such a debt is never paid twice.
CREATE TABLE IF NOT EXISTS crossfade.applied (token uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp());

-- The version of the definitions: another number after each DDL, given by `note_ddl`, so that a plan can be proven to be current. Numbers are random:
-- setval is no transaction's, two DDLs may come at once, and neither may bring back a number that was. Read by pg_sequence_last_value, whatever
-- the reader's snapshot. (nextval would change the lastval() of the session that runs the DDL.)
CREATE SEQUENCE IF NOT EXISTS crossfade.version;
SELECT setval('crossfade.version', 1) WHERE pg_sequence_last_value('crossfade.version') IS NULL;

-- Whoever has changed definitions and not committed yet holds a lock on it: ROW EXCLUSIVE where each change stands behind a lock on its table,
-- ROW SHARE where one does not (types, functions, privileges).
CREATE TABLE IF NOT EXISTS crossfade.ddl ();

CREATE OR REPLACE FUNCTION crossfade.note_ddl() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_tables CONSTANT text[] := '{table,table column,table constraint,index,trigger,policy,rule,sequence,view,default value}';
    found_kinds text[];
BEGIN
    IF TG_EVENT = 'sql_drop' THEN
        SELECT array_agg(DISTINCT object_type) INTO found_kinds FROM pg_event_trigger_dropped_objects()
        WHERE NOT is_temporary AND schema_name IS DISTINCT FROM 'crossfade' AND (original OR normal)
        AND NOT (object_type = 'trigger' AND object_identity ~ '^"?~?crossfade_(fence|lazy)');
    ELSE
        SELECT array_agg(DISTINCT object_type) INTO found_kinds FROM pg_event_trigger_ddl_commands()
        WHERE schema_name IS DISTINCT FROM 'pg_temp' AND schema_name IS DISTINCT FROM 'crossfade'
        -- The fence, and what lazy tables have, is no definition of the application's: no plan depends on it.
        AND NOT EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE object_type = 'trigger' AND t.oid = objid
            AND p.pronamespace = to_regnamespace('crossfade'))
        -- A GRANT does not say what it is about: `open_epoch` says that its own is ours. (Whoever else says so hides no more than what he gives away.)
        AND NOT (command_tag = 'GRANT' AND coalesce(current_setting('crossfade.installing', true), '') = 'on')
        AND command_tag NOT IN ('COMMENT', 'SECURITY LABEL', 'REFRESH MATERIALIZED VIEW', 'REINDEX', 'ALTER DEFAULT PRIVILEGES',
            'CREATE SERVER', 'ALTER SERVER', 'CREATE USER MAPPING', 'ALTER USER MAPPING');
    END IF;
    IF found_kinds IS NULL THEN
        RETURN;
    ELSIF found_kinds <@ of_tables THEN
        LOCK TABLE crossfade.ddl IN ROW EXCLUSIVE MODE;
    ELSE
        LOCK TABLE crossfade.ddl IN ROW SHARE MODE;
    END IF;
    PERFORM setval('crossfade.version', ('x' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 15))::bit(60)::bigint | 2);
END $$;

-- Only a superuser may make event triggers. Without them changes of definitions are noticed late: `run` says so.
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN SELECT * FROM (VALUES ('crossfade_ddl', 'ddl_command_end'), ('crossfade_drop', 'sql_drop')) AS v(name, event) LOOP
        IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = wanted.name) THEN
            EXECUTE format('CREATE EVENT TRIGGER %I ON %s EXECUTE FUNCTION crossfade.note_ddl()', wanted.name, wanted.event);
            -- Replicas' sessions (session_replication_role) change definitions, too.
            EXECUTE format('ALTER EVENT TRIGGER %I ENABLE ALWAYS', wanted.name);
        END IF;
    END LOOP;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE 'event triggers need a superuser';
END $$;

-- Which version holds, for a transaction whose plans were made for another; -1: it has changed definitions itself.
CREATE OR REPLACE FUNCTION crossfade.version_now() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation = 'crossfade.ddl'::regclass) THEN
        RETURN -1;
    END IF;
    RETURN pg_sequence_last_value('crossfade.version');
END $$;
-- Where a backfill stands, on the authority: a table's parts. after_key, upto_key: the part's keys (behind the one, up to the other), as in a
-- range debt, without its number and tag; position: the last key that is done. work, work_key: the range debt of the chunk in work, and its last key.
-- debts: the whole-table debts that are paid when all parts are done.
CREATE TABLE IF NOT EXISTS crossfade.backfill (
    number integer NOT NULL,
    part integer NOT NULL,
    debts bigint[] NOT NULL,
    after_key bytea,
    upto_key bytea,
    position bytea,
    work bigint,
    work_key bytea,
    rows bigint NOT NULL DEFAULT 0,
    done boolean NOT NULL DEFAULT false,
    begun timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (number, part)
) WITH (fillfactor = 50);

-- Indexes of tables on this side that a backfill drops while it fills them (src/migrate/backfill/indexes.rs): a row stands from before an index is dropped until
-- it is there again. name, relation: quoted, with their schemas. tablespace, comment: what a definition does not say.
CREATE TABLE IF NOT EXISTS crossfade.indexes (
    name text PRIMARY KEY,
    number integer NOT NULL,
    relation text NOT NULL,
    definition text NOT NULL,
    tablespace text,
    comment text,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- On new, tables with `backfill: lazy`: see src/migrate/lazy. complete: new has every row, and merging has ended. Made anew by each move that makes new the
-- authority.
CREATE TABLE IF NOT EXISTS crossfade.lazy (
    number integer PRIMARY KEY,
    complete boolean NOT NULL DEFAULT false,
    changed timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- What verify has found, on the authority: its last look at each table, and the last one that found all equal.
CREATE TABLE IF NOT EXISTS crossfade.verified (
    number integer PRIMARY KEY,
    epoch bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    rows bigint NOT NULL,
    different bigint NOT NULL,
    unsettled bigint NOT NULL,
    equal_epoch bigint,
    equal_at timestamptz
);
-- How far a look of verify has come that has not ended, on the authority, with each part of a table: its keys are those behind after_key up to upto_key; all up
-- to the key `position` (as in a range debt) was equal, seen in this epoch and since `owings.times` was so many. runner: command, or a proxy's background.
-- part -1: all of the table was equal.
DO $$ BEGIN
    -- Of before there were parts; what it says is worth an hour of hashing at most.
    IF to_regclass('crossfade.verifying') IS NOT NULL
        AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('crossfade.verifying') AND attname = 'part') THEN
        DROP TABLE crossfade.verifying;
    END IF;
END $$;
CREATE TABLE IF NOT EXISTS crossfade.verifying (
    number integer NOT NULL,
    runner text NOT NULL,
    part integer NOT NULL,
    epoch bigint NOT NULL,
    owings bigint NOT NULL,
    after_key bytea,
    upto_key bytea,
    position bytea,
    rows bigint NOT NULL,
    done boolean NOT NULL DEFAULT false,
    changed timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (number, runner, part)
) WITH (fillfactor = 50);
-- How often debts of a table were owed, and so had to be paid; what their carriers brought is not counted. A look of verify that began at one count says
-- nothing of what was owed later: `equal_owings` is the count at which the last one began that found all equal.
CREATE TABLE IF NOT EXISTS crossfade.owings (number integer PRIMARY KEY, times bigint NOT NULL);
-- Tables whose reads no proxy serves from the mirror until then, on the authority: a proxy that adds to what is owed says so beforehand (src/reads/block.rs).
CREATE TABLE IF NOT EXISTS crossfade.blocked (number integer PRIMARY KEY, until timestamptz NOT NULL) WITH (fillfactor = 10);
-- What each proxy has found that runs reads on both sides, by minute, on the authority: evidence for a gate (src/switch/record.rs).
CREATE TABLE IF NOT EXISTS crossfade.compared (
    proxy text,
    minute timestamptz,
    runs bigint NOT NULL,
    different bigint NOT NULL,
    failed bigint NOT NULL,
    PRIMARY KEY (proxy, minute)
);

-- The life of this side that was last looked at, and why it may lack what it had promised: see src/migrate/lives.rs.
CREATE TABLE IF NOT EXISTS crossfade.life (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    incarnation uuid NOT NULL,
    timeline integer NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    doubt text
);

-- Columns that came later. ALTER TABLE would wait for whoever moves, and have all others wait behind it, also where there is nothing to add.
--   migration.definition: what migrates, as the file of the proxy that moved says: proxies of other files refuse to serve while writes are mirrored.
--   proxies.holding: sessions of the proxy that may have a cursor WITH HOLD, or listen.
--   proxies.ready: the epoch for whose end its sessions have logged in on the other side.
--   migration.taken: of a pointer: somebody is about to write the claim. From then on the move cannot be withdrawn.
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN SELECT * FROM (VALUES ('migration', 'definition', 'text'), ('migration', 'taken', 'boolean NOT NULL DEFAULT false'),
        ('verified', 'equal_owings', 'bigint'), ('proxies', 'holding', 'bigint NOT NULL DEFAULT 0'), ('proxies', 'ready', 'bigint')) AS v(relation, name, kind)
    LOOP
        IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = format('crossfade.%I', wanted.relation)::regclass AND attname = wanted.name) THEN
            EXECUTE format('ALTER TABLE crossfade.%I ADD COLUMN %I %s', wanted.relation, wanted.name, wanted.kind);
        END IF;
    END LOOP;
END $$;

-- The sweep's logical slot on this side (src/migrate/sweep/slot.rs). lost: why its changes are lost, until the next one has begun and all tables
-- are owed.
CREATE TABLE IF NOT EXISTS crossfade.sweep (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    slot text NOT NULL,
    lost text,
    begun timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Shows an image of a row that a WITH clause has written (src/plan/within.rs): as a notice of level INFO, which goes to the client, the proxy, whatever
-- client_min_messages says. Not where the server would log it as well; nor one that is too large for a message: then the audit misses it. No settings of its
-- own: they would cost more than all the rest.
CREATE OR REPLACE FUNCTION crossfade.show_cte_image(image bytea, which integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF pg_catalog.octet_length(image) OPERATOR(pg_catalog.<) 67108864
        AND pg_catalog.current_setting('log_min_messages') OPERATOR(pg_catalog.!~) '^(debug|info)' THEN
        RAISE INFO '% %', which, image USING ERRCODE = 'CFIMG';
    END IF;
    RETURN NULL;
END $$;

-- The incarnation of this side, made anew where a crash or promotion has emptied it.
CREATE OR REPLACE FUNCTION crossfade.incarnate() RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found_id uuid;
BEGIN
    SELECT id INTO found_id FROM crossfade.incarnation LIMIT 1;
    IF found_id IS NULL THEN
        LOCK TABLE crossfade.incarnation IN SHARE ROW EXCLUSIVE MODE;
        SELECT id INTO found_id FROM crossfade.incarnation LIMIT 1;
        IF found_id IS NULL THEN
            INSERT INTO crossfade.incarnation VALUES (gen_random_uuid()) RETURNING id INTO found_id;
        END IF;
    END IF;
    RETURN found_id;
END $$;

-- For a client's statement that runs outside a transaction of ours (CALL, DO, VACUUM ...): registered before it runs.
DROP FUNCTION IF EXISTS crossfade.owe_unwrapped(bigint, bytea, text);
CREATE OR REPLACE FUNCTION crossfade.owe_unwrapped(debt bigint, debts bytea, reason text, epoch bigint DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF epoch IS NOT NULL THEN
        -- The debt is committed under the epoch's lock: who moves finds it, or it is refused.
        EXECUTE format('LOCK TABLE crossfade.epoch_%s IN ACCESS SHARE MODE', epoch);
    END IF;
    PERFORM set_config('synchronous_commit', 'local', true);
    INSERT INTO crossfade.ledger (id, holder_pid, holder_start, debts, reason)
    SELECT debt, pg_backend_pid(), (extract(epoch FROM backend_start) * 1000000)::bigint, debts, reason
    FROM pg_stat_activity WHERE pid = pg_backend_pid();
END $$;

-- ... and released when it has ended: from now on anyone may pay the debt. Only the registered backend itself may.
CREATE OR REPLACE FUNCTION crossfade.release_unwrapped(debt bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    UPDATE crossfade.ledger SET holder_pid = NULL, holder_start = NULL WHERE id = debt AND holder_pid = pg_backend_pid();
$$;

-- Transactions that have written on both sides and were committed here, which decides for the other side, by the name under which they were prepared there.
-- Written in the very transaction that decides (src/migrate/undecided.rs).
CREATE TABLE IF NOT EXISTS crossfade.decided (gid text PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE OR REPLACE FUNCTION crossfade.decide(gid text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ours CONSTANT text := ':' || pg_current_xact_id();
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
    -- Nobody decides for a transaction that is not his own.
    IF right(gid, length(ours)) <> ours THEN
        RAISE EXCEPTION 'crossfade: % is not the name of this transaction', gid;
    END IF;
    INSERT INTO crossfade.decided (gid) VALUES (decide.gid);
END $$;

-- What everyone may. Granted where it is missing only: GRANT is DDL and names no schema, so `note_ddl` gives another version for it, and
-- each start of a proxy would leave those plans unproven that others made before.
DO $$
DECLARE
    wanted text;
BEGIN
    IF NOT has_schema_privilege('public', 'crossfade', 'USAGE') THEN
        GRANT USAGE ON SCHEMA crossfade TO PUBLIC;
    END IF;
    IF NOT has_table_privilege('public', 'crossfade.incarnation', 'SELECT') THEN
        GRANT SELECT ON crossfade.incarnation TO PUBLIC;
    END IF;
    IF NOT has_sequence_privilege('public', 'crossfade.version', 'SELECT') THEN
        GRANT SELECT ON SEQUENCE crossfade.version TO PUBLIC;
    END IF;
    FOREACH wanted IN ARRAY '{id,carrier_xid,carrier_pid,carrier_start,carrier_incarnation,debts,reason}'::text[] LOOP
        IF NOT has_column_privilege('public', 'crossfade.ledger', wanted, 'INSERT') THEN
            EXECUTE format('GRANT INSERT (%I) ON crossfade.ledger TO PUBLIC', wanted);
        END IF;
    END LOOP;
END $$;
