//! `crossfade check`: whether two databases are fit to migrate, before anything is written. One [`Finding`] for each thing that is not as it
//! must be, or that an operator should know, with the SQL that mends it.
//!
//! `facts` are what both sides have by name and must have alike; `columns` compares tables column by column; `role` is what the control role
//! lacks; `clients` is what the application's roles lack; `expect` is what the file asks of new; `fence` what keeps writes around the proxies out; `federate`
//! what new needs to read old; `pooler` what stands between; `stays` what tables that stay on old ask for. Nothing here writes, but that loading the catalog gives tables their numbers where the schema is installed.

mod clients;
mod columns;
mod expect;
mod facts;
mod federate;
mod fence;
mod pooler;
mod role;
mod stays;

use tokio_postgres::{Client, Error};

use crate::catalog::{self, Catalog, CatalogError, Sides, Table};
use crate::config::{AuthMethod, Config};
use crate::phase::Side;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// A migration would fail on it, or a table could not be mirrored.
    Error,
    /// It goes, but not as one may expect.
    Warning,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What kind of thing it is about: `table`, `column`, `key`, `check constraint`, `role`, ...
    pub kind: &'static str,
    /// Where it is to be mended.
    pub side: Side,
    /// What it is about, with its schema.
    pub object: String,
    /// What is found.
    pub what: String,
    /// SQL (for `side`), or a sentence where no SQL helps.
    pub mend: String,
}

/// Why the check could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The definitions.
    #[error("{0}")]
    Catalog(#[from] CatalogError),
    /// Another query.
    #[error("{side}, while reading {what}: {}", said(.error))]
    Server {
        /// Where.
        side: Side,
        /// What was being read.
        what: &'static str,
        /// What the server or the connection said.
        error: Error,
    },
}

fn said(error: &Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string)
}

/// What every part of the check looks at.
struct View<'a> {
    clients: Sides<&'a Client>,
    catalog: &'a Catalog,
    /// The migrating tables, by name.
    tables: Vec<&'a Table>,
    found: Vec<Finding>,
}

impl View<'_> {
    async fn rows(
        &self,
        side: Side,
        what: &'static str,
        text: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>, CheckError> {
        let answer = self.clients.get(side).query(text, parameters).await;
        answer.map_err(|error| CheckError::Server { side, what, error })
    }

    /// OIDs of the migrating tables, without partitions.
    fn oids(&self, side: Side) -> Vec<u32> {
        self.tables.iter().map(|table| *table.oid.get(side)).collect()
    }

    fn error(&mut self, kind: &'static str, side: Side, object: &str, what: String, mend: String) {
        self.found.push(Finding { level: Level::Error, kind, side, object: object.to_owned(), what, mend });
    }

    fn warning(&mut self, kind: &'static str, side: Side, object: &str, what: String, mend: String) {
        self.found.push(Finding { level: Level::Warning, kind, side, object: object.to_owned(), what, mend });
    }
}

/// Looks at both sides. `old`, `new`: sessions of the control role, not in a transaction; their search_path is set.
pub async fn run(config: &Config, old: &Client, new: &Client) -> Result<Vec<Finding>, CheckError> {
    let clients = || Sides { old, new };
    for side in Side::BOTH {
        let path = clients().get(side).batch_execute("SET search_path = pg_catalog").await;
        path.map_err(|error| CheckError::Server { side, what: "settings", error })?;
    }
    // A role that may not read its own schema gives findings, not an error.
    let nothing = Catalog::default();
    let mut view = View { clients: clients(), catalog: &nothing, tables: Vec::new(), found: Vec::new() };
    pooler::compare(&mut view, config).await?;
    if view.found.iter().any(|finding| finding.kind == pooler::POOLER) {
        return Ok(view.found);
    }
    let verifiers = matches!(config.auth, AuthMethod::Scram | AuthMethod::Md5) && config.users.is_empty();
    role::attributes(&mut view, verifiers).await?;
    let mut found = view.found;
    if found.iter().any(|finding| finding.kind == role::BARRED) {
        return Ok(found);
    }
    let catalog = catalog::load(old, new, config.tables.as_deref(), &config.except).await?;
    let mut tables: Vec<&Table> = catalog.tables.values().map(AsRef::as_ref).collect();
    tables.sort_by_key(|table| table.label());
    let mut view = View { clients: clients(), catalog: &catalog, tables, found: Vec::new() };
    servers(&mut view);
    if config.sweep.follow {
        logical(&mut view).await?;
    }
    one_sided(&mut view, config.tables.is_some());
    columns::compare(&mut view).await?;
    facts::compare(&mut view).await?;
    role::privileges(&mut view).await?;
    clients::compare(&mut view).await?;
    expect::compare(&mut view, &config.expect).await?;
    expect::disk(&mut view, config.expect.disk).await?;
    set_aside(&mut view).await?;
    fence::compare(&mut view, config.fence).await?;
    stays::compare(&mut view).await?;
    logins(&mut view).await?;
    federate::compare(&mut view, config.federate).await?;
    found.append(&mut view.found);
    found.sort();
    found.dedup();
    Ok(found)
}

/// What the application's roles have on the side that `loses` authority and lack on the other, and which could not log in there. `catalog`: of both sides.
pub async fn privileges(
    config: &Config,
    catalog: &Catalog,
    old: &Client,
    new: &Client,
    loses: Side,
) -> Result<Vec<Finding>, CheckError> {
    let tables: Vec<&Table> = catalog.tables.values().map(AsRef::as_ref).collect();
    let mut view = View { clients: Sides { old, new }, catalog, tables, found: Vec::new() };
    let logins = clients::lacking(&mut view, loses).await?;
    clients::passwords(&mut view, config, loses, &logins).await?;
    view.found.sort();
    Ok(view.found)
}

/// What the file's `expect` asks of new, and new does not have.
pub async fn expected(config: &Config, old: &Client, new: &Client) -> Result<Vec<Finding>, CheckError> {
    let nothing = Catalog::default();
    let mut view = View { clients: Sides { old, new }, catalog: &nothing, tables: Vec::new(), found: Vec::new() };
    expect::compare(&mut view, &config.expect).await?;
    Ok(view.found)
}

/// Event triggers that run at each login (PostgreSQL 17), ours included, outside any statement of a client: nobody sees what they write.
async fn logins(view: &mut View<'_>) -> Result<(), CheckError> {
    let text = "SELECT evtname::text, quote_ident(evtname), evtfoid::regprocedure::text FROM pg_event_trigger WHERE evtevent = 'login' AND evtenabled <> 'D' ORDER BY 1";
    for side in Side::BOTH {
        for row in view.rows(side, "event triggers", text, &[]).await? {
            let what = format!(
                "{} runs at each login: what it writes to migrating tables is neither mirrored nor noticed",
                row.get::<_, String>(2)
            );
            let mend =
                format!("ALTER EVENT TRIGGER {} DISABLE; unless it writes no migrating table", row.get::<_, String>(1));
            view.warning("login trigger", side, row.get(0), what, mend);
        }
    }
    Ok(())
}

fn servers(view: &mut View<'_>) {
    let catalog = view.catalog;
    for (side, least) in [(Side::Old, 130_000), (Side::New, 150_000)] {
        let version = *catalog.version.get(side);
        if version < least {
            let what = format!("it is PostgreSQL {}, and must be {} or newer", version / 10_000, least / 10_000);
            view.error("server", side, "server_version", what, "upgrade it first".to_owned());
        }
    }
    let (old, new) = (&catalog.encoding.old, &catalog.encoding.new);
    if old != new {
        let what = format!("old is encoded in {old}, new in {new}");
        let mend = format!("make new's database with ENCODING '{old}', or UTF8");
        // Any text can be UTF8; SQL_ASCII may hold bytes that are no text.
        if new == "UTF8" && old != "SQL_ASCII" {
            view.warning(
                "encoding",
                Side::New,
                "database",
                what,
                "none needed: every text of old has a form there".to_owned(),
            );
        } else {
            view.error("encoding", Side::New, "database", what, mend);
        }
    }
}

/// What a sweep needs of either side: each is the authority at some time.
async fn logical(view: &mut View<'_>) -> Result<(), CheckError> {
    let text = "SELECT current_setting('wal_level'), (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user), quote_ident(current_user), \
        current_setting('max_replication_slots')::int <= (SELECT count(*) FROM pg_replication_slots WHERE slot_name NOT LIKE 'crossfade%')";
    for side in Side::BOTH {
        let row = &view.rows(side, "what a sweep needs", text, &[]).await?[0];
        let (level, role): (String, String) = (row.get(0), row.get(2));
        if level != "logical" {
            let what = format!("it is {level}: sweep.follow needs logical");
            let mend = "ALTER SYSTEM SET wal_level = 'logical'; and restart the server".to_owned();
            view.error("server", side, "wal_level", what, mend);
        }
        if !row.get::<_, bool>(1) {
            let what = "it may not use replication slots: sweep.follow needs one".to_owned();
            view.error("control privilege", side, &role, what, format!("ALTER ROLE {role} REPLICATION;"));
        }
        if row.get::<_, bool>(3) {
            let what = "all of them are in use: sweep.follow needs one".to_owned();
            let mend = "ALTER SYSTEM SET max_replication_slots = 20; and restart the server".to_owned();
            view.error("server", side, "max_replication_slots", what, mend);
        }
    }
    Ok(())
}

/// Indexes that a backfill has dropped, and did not come to make again.
async fn set_aside(view: &mut View<'_>) -> Result<(), CheckError> {
    let what = "indexes that were set aside";
    for side in Side::BOTH {
        let there = "SELECT to_regclass('crossfade.indexes') IS NOT NULL";
        if !view.rows(side, what, there, &[]).await?[0].get::<_, bool>(0) {
            continue;
        }
        let text = "SELECT name, relation, definition FROM crossfade.indexes x \
            WHERE NOT EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = to_regclass(x.name) AND i.indisvalid) ORDER BY name";
        for row in view.rows(side, what, text, &[]).await? {
            let (name, relation, definition): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            let what = format!("a backfill has dropped index {name}; `crossfade backfill` makes it again at its end");
            view.error("index", side, &relation, what, format!("{definition};"));
        }
    }
    Ok(())
}

fn one_sided(view: &mut View<'_>, named: bool) {
    let catalog = view.catalog;
    for name in &catalog.one_sided.old {
        let what = "it is not on new: it does not migrate".to_owned();
        let mend =
            format!("pg_dump --schema-only --table={name} of old into new; or leave it out by `except: [{name}]`");
        view.error("table", Side::New, name, what, mend);
    }
    for name in &catalog.one_sided.new {
        let what = "it is on new only".to_owned();
        let mend = "none needed, unless old should have it".to_owned();
        if named {
            view.error("table", Side::Old, name, what, mend);
        } else {
            view.warning("table", Side::New, name, what, mend);
        }
    }
}
