//! What new is given for its lazy tables, while old is the authority: nobody uses it yet, so that it is made anew each time.

use std::sync::Arc;

use tokio_postgres::Client;

use super::sql::{Declared, Shape, literal};
use crate::catalog::{Catalog, Table, quote};
use crate::config::{Database, SslMode};
use crate::migrate::error::Error;
use crate::phase::Side;

/// Rows in one answer of old to a foreign scan: 100 is the default, and more round trips; what is read ahead is kept in memory by each session.
const FETCH: u32 = 1000;

fn failed(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |error| Error::from_driver(Side::New, doing, &error)
}

/// The foreign server old, for the control role, and `touch_old`. Schema crossfade is there. The role must be a superuser, or be allowed to use postgres_fdw.
pub async fn serve_old(new: &Client, old: &Database) -> Result<(), Error> {
    let doing = "making old a foreign server";
    let run = async |sql: &str| new.batch_execute(sql).await.map_err(failed(doing));
    run("BEGIN; SET LOCAL client_min_messages = warning; SELECT pg_advisory_xact_lock(hashtextextended('crossfade.install', 0))").await?;
    let made = async {
        // The password is in the text of CREATE USER MAPPING: the server's log is not to have it, where this role may say so.
        let superuser: bool =
            new.query_one("SELECT current_setting('is_superuser') = 'on'", &[]).await.map_err(failed(doing))?.get(0);
        if superuser {
            run("SET LOCAL log_statement = 'none'; SET LOCAL log_min_duration_statement = -1; SET LOCAL log_min_error_statement = 'panic'").await?;
        }
        run("CREATE EXTENSION IF NOT EXISTS postgres_fdw").await?;
        let text = "SELECT EXISTS (SELECT FROM pg_catalog.pg_foreign_server WHERE srvname = 'crossfade_old'), \
            EXISTS (SELECT FROM pg_catalog.pg_user_mappings WHERE srvname = 'crossfade_old' AND usename = current_user), \
            (SELECT coalesce(srvoptions, '{}') FROM pg_catalog.pg_foreign_server WHERE srvname = 'crossfade_old'), \
            (SELECT coalesce(umoptions, '{}') FROM pg_catalog.pg_user_mappings WHERE srvname = 'crossfade_old' AND usename = current_user)";
        let row = new.query_one(text, &[]).await.map_err(failed(doing))?;
        let (server, mapping): (bool, bool) = (row.get(0), row.get(1));
        let before = |at: usize| row.get::<_, Option<Vec<String>>>(at).unwrap_or_default();
        let clause = |wanted: Vec<(&str, String)>, had: Vec<String>, fresh: bool| {
            let mut parts: Vec<String> = wanted
                .iter()
                .map(|(name, value)| {
                    let set = had.iter().any(|option| option.starts_with(&format!("{name}=")));
                    let verb = match (fresh, set) {
                        (true, _) => "",
                        (false, true) => "SET ",
                        (false, false) => "ADD ",
                    };
                    format!("{verb}{name} {}", literal(value))
                })
                .collect();
            let kept = |option: &String| wanted.iter().any(|(name, _)| option.starts_with(&format!("{name}=")));
            if !fresh {
                let unwanted = had.iter().filter(|option| !kept(option)).filter_map(|option| option.split_once('='));
                parts.extend(unwanted.map(|(name, _)| format!("DROP {name}")));
            }
            parts.join(", ")
        };
        let (verb, behind) =
            if server { ("ALTER SERVER", "") } else { ("CREATE SERVER", " FOREIGN DATA WRAPPER postgres_fdw") };
        run(&format!("{verb} crossfade_old{behind} OPTIONS ({})", clause(of_server(old), before(2), !server))).await?;
        let verb = if mapping { "ALTER" } else { "CREATE" };
        let options = clause(of_user(old), before(3), !mapping);
        run(&format!("{verb} USER MAPPING FOR CURRENT_USER SERVER crossfade_old OPTIONS ({options})")).await?;
        run("CREATE FOREIGN TABLE IF NOT EXISTS crossfade.old_flush (one boolean) SERVER crossfade_old OPTIONS (schema_name 'crossfade', table_name 'flush')").await?;
        run(TOUCH).await?;
        run("COMMIT").await
    };
    let made = made.await;
    if made.is_err() {
        let _ = new.batch_execute("ROLLBACK").await;
    }
    made
}

/// Called in front of a statement that reads what only old has, in its transaction: old's snapshot there is taken by the first query of the transaction and
/// kept, and must be older than new's of each such statement (docs/protocols.md, *Lazy*). So new's must be taken anew by each statement.
/// `means`: the names in the statement mean lazy tables in this session, and nothing else.
const TOUCH: &str = "CREATE OR REPLACE FUNCTION crossfade.touch_old(means boolean) RETURNS void LANGUAGE plpgsql SECURITY DEFINER \
    SET search_path = pg_catalog, pg_temp AS $touch$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = format('crossfade cannot merge rows of old into a %s transaction', upper(current_setting('transaction_isolation'))),
            HINT = 'Read the table in a READ COMMITTED transaction, or complete it with `crossfade backfill`.';
    ELSIF current_setting('session_replication_role') = 'replica' THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = 'crossfade does not bring rows of old over in a session whose session_replication_role is replica',
            HINT = 'Set it to origin, or complete the table with `crossfade backfill`.';
    ELSIF means IS NOT TRUE THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = 'a name in this statement means another relation here than the table of which rows are still on old',
            HINT = 'Write the table with its schema.';
    END IF;
    PERFORM FROM crossfade.old_flush;
END $touch$";

fn of_server(old: &Database) -> Vec<(&'static str, String)> {
    let hosts: Vec<&str> = old.hosts.iter().map(|(host, _)| host.as_str()).collect();
    let ports: Vec<String> = old.hosts.iter().map(|(_, port)| port.to_string()).collect();
    let mode = match old.sslmode {
        SslMode::Disable => "disable",
        SslMode::Prefer => "prefer",
        SslMode::Require => "require",
        SslMode::VerifyCa => "verify-ca",
        SslMode::VerifyFull => "verify-full",
    };
    let mut options = vec![
        ("host", hosts.join(",")),
        ("port", ports.join(",")),
        ("dbname", old.database.clone()),
        ("sslmode", mode.to_owned()),
        ("connect_timeout", old.connect_timeout.as_secs().max(2).to_string()),
        ("fetch_size", FETCH.to_string()),
        ("updatable", "false".to_owned()),
    ];
    options.extend(old.sslrootcert.clone().map(|path| ("sslrootcert", path)));
    options.extend(old.options.clone().map(|value| ("options", value)));
    options
}

fn of_user(old: &Database) -> Vec<(&'static str, String)> {
    let mut options = vec![("user", old.user.clone())];
    options.extend(old.password.clone().map(|password| ("password", password)));
    options
}

/// Makes it anew for these tables, empty: what new speaks for is told from now on. Old is the authority, and nothing of this is in use.
pub async fn make(new: &Client, catalog: &Catalog) -> Result<(), Error> {
    for table in lazy(catalog) {
        if !super::obstacles(new, catalog, &table).await?.is_empty() {
            // A gate says so.
            continue;
        }
        let shape = Shape { columns: declared(new, &table).await?, table: &table };
        let mut texts = Shape::drop(&table);
        texts.push("SELECT set_config('crossfade.installing', 'on', true)".to_owned());
        texts.extend(shape.create());
        texts.extend(readers(new, &table).await?);
        texts.push(format!(
            "INSERT INTO crossfade.lazy (number) VALUES ({}) ON CONFLICT (number) DO UPDATE SET complete = false, changed = clock_timestamp()",
            table.number
        ));
        // Last: they take the table's lock.
        texts.extend(shape.triggers());
        run(new, &texts.join(";\n")).await?;
    }
    Ok(())
}

fn lazy(catalog: &Catalog) -> Vec<Arc<Table>> {
    let mut tables: Vec<Arc<Table>> = catalog.tables.values().filter(|table| table.lazy).cloned().collect();
    tables.sort_by_key(|table| table.number);
    tables
}

async fn run(new: &Client, sql: &str) -> Result<(), Error> {
    let text = format!(
        "BEGIN; SET LOCAL client_min_messages = warning; SET LOCAL search_path = pg_catalog; SET LOCAL lock_timeout = '2s';\n{sql};\nCOMMIT"
    );
    if let Err(error) = new.batch_execute(&text).await {
        let _ = new.batch_execute("ROLLBACK").await;
        return Err(failed("preparing lazy tables")(error));
    }
    Ok(())
}

/// The columns in the order of new's table, as it declares them.
async fn declared(new: &Client, table: &Table) -> Result<Vec<Declared>, Error> {
    let text = "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), \
        CASE WHEN a.attcollation <> t.typcollation THEN (SELECT format(' COLLATE %I.%I', n.nspname, c.collname) \
        FROM pg_catalog.pg_collation c JOIN pg_catalog.pg_namespace n ON n.oid = c.collnamespace WHERE c.oid = a.attcollation) END \
        FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
        WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    // Types of users come with their schema.
    new.batch_execute("SET search_path = pg_catalog").await.map_err(failed("reading columns"))?;
    let rows = new.query(text, &[&table.oid.new]).await.map_err(failed("reading columns"));
    new.batch_execute("RESET search_path").await.map_err(failed("reading columns"))?;
    let rows = rows?;
    let declared = rows.iter().filter_map(|row| {
        let name: String = row.get(0);
        let column = table.columns.iter().find(|column| column.name.new == name)?;
        Some(Declared {
            old: column.name.old.clone(),
            new: name,
            kind: row.get(1),
            collation: row.get::<_, Option<String>>(2).unwrap_or_default(),
            generated: column.generated.new,
        })
    });
    Ok(declared.collect())
}

/// Who may read the table may read what only old has of it.
async fn readers(new: &Client, table: &Table) -> Result<Vec<String>, Error> {
    let text = "SELECT NULL::text, CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END \
        FROM pg_catalog.pg_class c, pg_catalog.aclexplode(coalesce(c.relacl, pg_catalog.acldefault('r', c.relowner))) a \
        WHERE c.oid = $1 AND a.privilege_type = 'SELECT' UNION \
        SELECT t.attname::text, CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END \
        FROM pg_catalog.pg_attribute t, pg_catalog.aclexplode(t.attacl) a WHERE t.attrelid = $1 AND a.privilege_type = 'SELECT'";
    let rows = new.query(text, &[&table.oid.new]).await.map_err(failed("reading who may read a lazy table"))?;
    let key = table.key.iter().flat_map(|key| &key.columns).map(|&at| &table.columns[at].name.new);
    let key: Vec<&String> = key.collect();
    let grants = |row: &tokio_postgres::Row| {
        let (column, role): (Option<String>, String) = (row.get(0), row.get(1));
        let of = column.as_ref().map_or_else(String::new, |column| format!(" ({})", quote(column)));
        let grant = |what: &str| format!("GRANT SELECT{of} ON {} TO {role}", crate::ledger::lazy(what, table.number));
        // Who reads by key asks of which keys new speaks.
        let gone = column.as_ref().is_none_or(|column| key.contains(&column)).then(|| grant("gone"));
        [Some(grant("missing")), gone].into_iter().flatten().collect::<Vec<_>>()
    };
    Ok(rows.iter().flat_map(grants).collect())
}

/// Where new becomes the authority, no other tables are lazy than those that the file names now and that are not complete.
pub async fn no_others(new: &Client, catalog: &Catalog) -> Result<(), Error> {
    let numbers: Vec<i32> = lazy(catalog).iter().map(|table| table.number.cast_signed()).collect();
    let text = "UPDATE crossfade.lazy SET complete = true, changed = clock_timestamp() WHERE NOT complete AND number <> ALL ($1)";
    new.execute(text, &[&numbers]).await.map(drop).map_err(failed("noting which tables are lazy"))
}

/// A migration begins anew: what was complete is not.
pub async fn forget(new: &Client) -> Result<(), Error> {
    new.batch_execute("UPDATE crossfade.lazy SET complete = false, changed = clock_timestamp() WHERE complete")
        .await
        .map_err(failed("forgetting what lazy tables had"))
}

/// Takes the triggers of all tables away, and the foreign server with what hangs on it. The extension stays: others may use it.
pub async fn remove(new: &Client) -> Result<(), Error> {
    let text = "SELECT format('DROP TRIGGER IF EXISTS %I ON %I.%I', t.tgname, n.nspname, c.relname) FROM pg_catalog.pg_trigger t \
        JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid \
        WHERE p.pronamespace = pg_catalog.to_regnamespace('crossfade') AND p.proname ~ '^lazy_(bring|gone)_[0-9]+$' AND NOT t.tgisinternal";
    let rows = new.query(text, &[]).await.map_err(failed("looking for triggers of lazy tables"))?;
    for row in rows {
        run(new, row.get(0)).await?;
    }
    run(new, "DROP SERVER IF EXISTS crossfade_old CASCADE").await
}
