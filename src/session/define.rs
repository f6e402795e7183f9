//! DDL that a client sends: `mirror.ddl` says whether it runs on both sides, on the authority only, or not at all.
//!
//! On both sides: the authority runs it in the client's transaction (or one of ours), the same text stands among the transaction's writes in its
//! order, and the mirror executes it before the authority's COMMIT, as it does images. Its outcome is that of the transaction on both sides but for a
//! crash between the two commits: then the tables that it names are owed, and cannot pay before both sides agree again.
//! Images behind it are not used: the plans were made for the definitions before it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{info, warn};

use super::expect::To;
use super::{End, Kept, Session};
use crate::config::Ddl;
use crate::mirror::writes::{Definition, Op};
use crate::plan::cache::Planned;
use crate::plan::{Opaque, Plan};
use crate::wire::frame::{self, HEAD, Report};

pub(super) const NAME: &[u8] = b"crossfade_definition";

/// The version of the definitions, then the settings under which the text means what it means.
const ASK: &[u8] = b"SELECT pg_catalog.pg_sequence_last_value(pg_catalog.to_regclass('crossfade.version')::pg_catalog.oid)::pg_catalog.text, \
    current_user::pg_catalog.text, pg_catalog.current_setting('search_path'), pg_catalog.current_setting('standard_conforming_strings'), \
    pg_catalog.current_setting('check_function_bodies'), pg_catalog.current_setting('DateStyle'), pg_catalog.current_setting('IntervalStyle'), \
    pg_catalog.current_setting('TimeZone')";

/// Their names, in the order of `ASK`.
const SETTINGS: [&str; 7] = [
    "role",
    "search_path",
    "standard_conforming_strings",
    "check_function_bodies",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
];

/// How long the client's next transaction waits for the definitions that it has changed.
const RENEWAL: Duration = Duration::from_secs(1);

/// What was before the DDL.
pub(super) struct Defined {
    version: Option<i64>,
    settings: Vec<(&'static str, String)>,
    since: Instant,
}

impl Session {
    /// It runs on both sides, in one transaction on each.
    pub(super) fn replays(&self, opaque: &Opaque) -> bool {
        opaque.replays && self.shared.config.load().mirror.ddl == Ddl::Mirror
    }

    /// `mirror.ddl` refuses it.
    pub(super) fn refuses_ddl(&self, opaque: &Opaque) -> Option<Report> {
        (opaque.ddl && self.shared.config.load().mirror.ddl == Ddl::Refuse).then(|| {
            Report::error(
                "0A000",
                "crossfade does not change definitions while writes are mirrored: mirror.ddl is refuse",
                "Change both databases directly, the mirror first where columns are added; or set mirror.ddl: mirror.",
            )
        })
    }

    /// In front of a statement: what has to be known of the moment before DDL. None: it is none that runs on both sides, or it will fail.
    pub(super) async fn before_definition(&mut self, planned: &Planned) -> Result<Option<Defined>, End> {
        let Plan::Opaque(opaque) = &planned.plan else { return Ok(None) };
        if !opaque.ddl {
            return Ok(None);
        }
        if !self.replays(opaque) {
            info!(user = %self.user(), "DDL that runs on the authority only: what it changes is to be changed on the mirror, too");
        }
        if !self.in_block() {
            self.outdated = Some(self.world.generation);
            self.writes.redefined = true;
            return Ok(None);
        }
        self.settle().await?;
        if self.status == b'E' || self.queue.skipping() {
            return Ok(None);
        }
        self.outdated = Some(self.world.generation);
        let Some((version, settings)) = self.ask_definition().await? else { return Ok(None) };
        let planned_for = self.world.catalog.definitions.get(self.side).version;
        if planned_for.is_some() && version != planned_for && !self.writes.redefined && !self.writes.is_empty() {
            // What was written so far was planned for definitions that did not hold: what it means nobody knows.
            self.forsake();
        }
        if !self.replays(opaque) {
            self.writes.redefined = true;
            return Ok(None);
        }
        Ok(Some(Defined { version, settings, since: Instant::now() }))
    }

    /// Behind it: where it has changed definitions (and not only those of temporary objects), the mirror is to run it, too.
    pub(super) async fn after_definition(&mut self, before: Defined, text: &Bytes) -> Result<(), End> {
        let took = before.since.elapsed();
        self.settle().await?;
        if self.status == b'E' || self.queue.skipping() {
            return Ok(());
        }
        let Some((version, _)) = self.ask_definition().await? else { return Ok(()) };
        if version.is_some()
            && version == before.version
            && self.world.catalog.definitions.get(self.side).version.is_some()
        {
            return Ok(());
        }
        self.writes.redefined = true;
        if self.settings.client_encoding != "UTF8" && !text.is_ascii() {
            warn!("DDL in an encoding other than UTF8 is not run on the mirror: run it there");
            self.give_up("definition");
            return Ok(());
        }
        let Defined { settings, .. } = before;
        self.writes.push(Op::Define(Arc::new(Definition { text: text.clone(), settings, took })));
        Ok(())
    }

    async fn ask_definition(&mut self) -> Result<Option<(Option<i64>, Vec<(&'static str, String)>)>, End> {
        self.kept = Kept::default();
        self.put_ours(NAME, ASK, &[], &[], To::Us);
        self.settle().await?;
        if let Some(error) = self.kept.error.take() {
            let error = frame::server_error(&error[HEAD..]);
            return Err(End::Refused(Report::fatal(
                "58000",
                format!("crossfade cannot tell which definitions hold: {}", error.message),
                "The transaction is rolled back. Run `crossfade install`, or set mirror.ddl: authority; then connect again.",
            )));
        }
        let Some(row) = self.kept.rows.pop() else { return Ok(None) };
        let mut values = row.into_iter().map(|value| value.map(|value| String::from_utf8_lossy(&value).into_owned()));
        let version = values.next().flatten().and_then(|value| value.parse().ok());
        let settings = SETTINGS.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?)));
        Ok(Some((version, settings.collect())))
    }

    /// The images so far mean nothing that is known: all tables are owed in their place.
    fn forsake(&mut self) {
        info!("definitions have changed under a transaction, and what it wrote cannot be told: all tables are owed");
        let tables: Vec<u32> = self.world.catalog.tables.keys().copied().collect();
        if self.writes.forsake() {
            self.give_up("definition");
        }
        tables.into_iter().for_each(|table| self.taint(table, "definition"));
    }

    /// The first message behind a transaction that has changed definitions: they are to be read again first, or what this client writes next is planned
    /// for those of before. That takes a moment, and is waited for no longer than that.
    pub(super) async fn renewed(&mut self) {
        let Some(generation) = self.outdated.take() else { return };
        let deadline = tokio::time::Instant::now() + RENEWAL;
        loop {
            let renewed = self.shared.renewed.notified();
            if self.shared.world.load().generation > generation || self.world.phase.mirror().is_none() {
                return;
            }
            self.shared.stale.notify_one();
            if tokio::time::timeout_at(deadline, renewed).await.is_err() {
                return;
            }
        }
    }

    /// A whole-transaction wait that is as long as the authority's own needs to be for DDL on the mirror.
    pub(super) fn patience(ops: &[Op], timeout: Duration) -> Duration {
        let took = ops.iter().filter_map(|op| match op {
            Op::Define(definition) => Some(definition.took * 4),
            _ => None,
        });
        timeout + took.sum::<Duration>()
    }
}
