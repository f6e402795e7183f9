//! Reads that new answers although it is not the authority (R1 to R3): over a login of the client of its own, which cannot write, and only while new has all
//! that this session, or anybody to whom something was acknowledged, can know of. Whatever is in the way, the authority answers. `point` asks both sides so.
//!
//! A read comes as a whole: one Query, or Parse, Bind, Describe, Execute, Sync in one piece, outside any block. Its frames stay in the client's buffer until new has
//! begun to answer, so that nothing has happened where it does not.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tracing::debug;

use super::answer::{Begun, Ended};
use super::books::{Prepared, Settings, There};
use super::carry::{greeted, literal};
use super::{End, Session};
use crate::backend::connect::{self, Address, read_only, to_database};
use crate::catalog::Sides;
use crate::config::{Commit, ServeBy};
use crate::phase::Side;
use crate::plan::Plan;
use crate::plan::cache::Planned;
use crate::plan::read::Read;
use crate::reads::look::Says;
use crate::reads::tally::Kept;
use crate::shared::Shared;
use crate::wire::conn::Conn;
use crate::wire::frame::{self, Fields, HEAD, Head};
use crate::wire::stream::Stream;

/// A longer read goes to the authority, in bytes.
const LONGEST: usize = 64 * 1024;
/// After so many eligible reads without anything else between, a session waits for a look instead of going on with the authority.
const STREAK: u32 = 3;
/// ... for so long; and not again before so many times what it has waited. A session that writes now and then loses a tenth of its time to waits, and no more.
const GRACE: Duration = Duration::from_millis(100);
const APART: u32 = 9;
/// New did not answer: for so long this session does not ask again.
const SHUNNED: Duration = Duration::from_secs(2);
/// Statements prepared on new for one session, at most.
const PREPARED_MAX: usize = 256;

/// What new's session must have as the authority's has it; and why it cannot, if so.
const STATE: &[u8] = b"SELECT '', CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema()) THEN 'temporary' \
    WHEN pg_catalog.current_setting('default_transaction_isolation') = 'serializable' THEN 'serializable' \
    WHEN current_user <> session_user THEN 'role' ELSE '' END UNION ALL \
    SELECT name, setting FROM pg_catalog.pg_settings WHERE context = 'user' AND (source IN ('session', 'user', 'database', 'database user', 'client') \
    OR name IN ('DateStyle', 'TimeZone', 'IntervalStyle', 'extra_float_digits', 'bytea_output', 'client_encoding', 'search_path', 'lc_monetary', 'lc_numeric', \
    'lc_time', 'standard_conforming_strings', 'xmlbinary', 'xmloption', 'default_text_search_config', 'array_nulls', 'timezone_abbreviations')) \
    AND name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'default_transaction_read_only', \
    'default_transaction_isolation', 'default_transaction_deferrable', 'session_authorization', 'role', 'is_superuser')";

/// A session for reads.
pub(super) struct Seat {
    pub(super) conn: Conn<Stream>,
    address: Address,
    key: Bytes,
    /// Texts by the names that they are prepared under.
    pub(super) prepared: HashMap<Bytes, Bytes>,
    /// So many answers are still to come that nobody wants.
    pub(super) unwanted: usize,
    counted: prometheus::IntGauge,
}

/// What a session has for reads on one side.
#[derive(Default)]
enum Place {
    /// Nothing yet.
    #[default]
    Empty,
    /// A session.
    Taken(Box<Seat>),
    /// The server did not answer; not before this moment again.
    Shunned(Instant),
}

/// Whether the sessions for reads have the settings that the authority's has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// They must be asked for.
    Unknown,
    /// It has.
    Same,
    /// It cannot have.
    Unfit,
}

/// What a session needs in order to be served by another one than its own.
pub(super) struct Serving {
    places: Sides<Place>,
    state: State,
    /// When the authority last answered in a phase in which new serves.
    contact: Option<Instant>,
    /// Eligible reads since anything else was asked.
    streak: u32,
    /// It waits for no look before this moment.
    rested: Option<Instant>,
    /// Among sessions, 0 to 1: whether it is in a share.
    lot: f64,
}

impl Serving {
    pub(super) fn new() -> Serving {
        let lot = f64::from(rand::random::<u32>()) / f64::from(u32::MAX);
        Serving { places: Sides::default(), state: State::Unknown, contact: None, streak: 0, rested: None, lot }
    }

    /// The authority has answered.
    pub(super) fn touch(&mut self) {
        self.contact = Some(Instant::now());
    }

    /// A statement that may change what later ones see, beside rows.
    pub(super) fn alter(&mut self) {
        self.state = State::Unknown;
    }

    /// The world is another: in phases without a mirror nobody notes what a statement alters. `moved`: of another epoch, which began when all that was under
    /// way in the one before had ended.
    pub(super) fn renew(&mut self, moved: bool) {
        self.state = State::Unknown;
        if moved {
            (self.contact, self.places) = (None, Sides::default());
        }
    }
}

/// A read, as it lies in the client's buffer.
pub(super) struct Asked {
    pub(super) text: Bytes,
    /// Of the extended protocol.
    pub(super) piped: Option<Piped>,
    /// Bytes of all its frames.
    pub(super) total: usize,
    /// Of its text, as its plan has it.
    end: usize,
}

pub(super) struct Piped {
    pub(super) statement: Bytes,
    pub(super) types: Bytes,
    /// The client has sent Parse itself.
    parses: bool,
    /// Bind's payload.
    pub(super) bind: Bytes,
    /// What lies behind Parse.
    rest: usize,
}

impl Session {
    /// Serves the read that begins the client's buffer from new, where that is proven right. False: nothing has happened, and the authority is asked.
    pub(super) async fn serve_read(&mut self, head: Head) -> Result<bool, End> {
        let config = self.shared.config.load_full();
        if config.most.serve <= 0.0 || config.mirror.commit == Commit::BestEffort {
            return Ok(false);
        }
        let Some(mut asked) = self.asked(head)? else { return Ok(false) };
        let planned = self.plan_of(&mut asked);
        let Read::Eligible(read) = &planned.read else {
            // A driver that prepares in one pipeline and runs in the next has not written.
            self.serving.streak = 0;
            return Ok(false);
        };
        if planned.plan != Plan::Pass || planned.is_refused() {
            return Ok(false);
        }
        let lot = match config.reads.serve_by {
            ServeBy::Session => self.serving.lot,
            ServeBy::Statement => rand::random(),
        };
        let within = lot < config.most.serve
            && read.tables.iter().all(|table| {
                config.tables.is_none() && lot < config.serve_share("") || lot < config.serve_share(&table.label())
            });
        let kept = match within {
            false => Some(Kept::Share),
            true => self.why_not(&planned, &asked).await?,
        };
        let kept = match kept {
            None if self.answered_by_new(&planned, &asked).await? => None,
            None => Some(Kept::Failed),
            why => why,
        };
        match kept {
            None => {
                self.shared.reads.tally.served();
                self.shared.metrics.read_served.with_label_values(&[Side::New.name()]).inc();
                Ok(true)
            }
            Some(why) => {
                self.shared.reads.tally.kept(why);
                self.shared.metrics.read_kept.with_label_values(&[why.name()]).inc();
                self.shared.metrics.read_served.with_label_values(&[self.side.name()]).inc();
                Ok(false)
            }
        }
    }

    /// A statement that was prepared before is not read again.
    pub(super) fn plan_of(&mut self, asked: &mut Asked) -> Arc<Planned> {
        let terms = self.terms();
        let before = asked.piped.as_ref().filter(|piped| !piped.parses).map(|piped| &piped.statement);
        let known = before.and_then(|name| self.prepared.get(name)?.planned.clone());
        let (planned, end) = match known {
            Some((of, planned, end)) if of == terms => (planned, end),
            _ => self.plan_for(&asked.text),
        };
        asked.end = end;
        planned
    }

    /// Between two statements, outside any block and pipeline.
    fn is_between(&self) -> bool {
        self.at_rest()
            && self.aside.is_none()
            && !self.queue.skipping()
            && !self.settings.unsettled
            && !self.entry.is_over()
            && self.registered.is_empty()
            && self.copying.is_none()
    }

    /// A read outside any block. None: it has not come whole, or has another form.
    pub(super) fn asked(&self, head: Head) -> Result<Option<Asked>, End> {
        let inb = &self.client.inb;
        let form = matches!(head.tag, b'Q' | b'P' | b'B') && head.total <= LONGEST;
        if !form || inb.len() < head.total || !self.is_between() {
            return Ok(None);
        }
        if head.tag == b'Q' {
            let text = Fields::new(&inb[HEAD..head.total]).string()?;
            return Ok(Some(Asked { text: Bytes::copy_from_slice(text), piped: None, total: head.total, end: 0 }));
        }
        let mut at = 0;
        let mut parsed = None;
        if head.tag == b'P' {
            let mut fields = Fields::new(&inb[HEAD..head.total]);
            let (name, text) = (fields.string()?, fields.string()?);
            if !name.is_empty() && self.prepared.contains_key(name) {
                return Ok(None);
            }
            let copy = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
            parsed = Some((copy(name), copy(text), copy(fields.rest())));
            at = head.total;
        }
        let rest = at;
        let Some(bind) = whole(inb, &mut at, b'B')? else { return Ok(None) };
        let mut fields = Fields::new(bind);
        if !fields.string()?.is_empty() {
            return Ok(None);
        }
        let statement = Bytes::copy_from_slice(fields.string()?);
        let bind = Bytes::copy_from_slice(bind);
        if let Some(describe) = whole(inb, &mut at, b'D')?
            && describe != b"P\0"
        {
            return Ok(None);
        }
        let Some(execute) = whole(inb, &mut at, b'E')? else { return Ok(None) };
        if execute != b"\0\0\0\0\0" || whole(inb, &mut at, b'S')?.is_none() || at > LONGEST {
            return Ok(None);
        }
        let parses = parsed.is_some();
        let (text, types) = match parsed {
            Some((name, text, types)) if name == statement => (text, types),
            Some(_) => return Ok(None),
            None => match self.prepared.get(&statement) {
                Some(Prepared { text: Some(text), types, .. }) => (text.clone(), types.clone()),
                _ => return Ok(None),
            },
        };
        Ok(Some(Asked { text, piped: Some(Piped { statement, types, parses, bind, rest }), total: at, end: 0 }))
    }

    /// What is in the way of new's answer; at the end nothing has been waited for since it was asked.
    async fn why_not(&mut self, planned: &Planned, asked: &Asked) -> Result<Option<Kept>, End> {
        if !self.shared.health.get(Side::New).up() {
            return Ok(Some(Kept::Failed));
        }
        if self.settings.role_changed || self.serving.state == State::Unfit {
            return Ok(Some(Kept::State));
        }
        self.serving.streak = self.serving.streak.saturating_add(1);
        match self.what_new_has(planned) {
            Says::Later if !self.wait_for_look(planned).await => return Ok(Some(Kept::Grace)),
            Says::Owed => return Ok(Some(Kept::Owed)),
            _ => {}
        }
        if !self.take_place(Side::New).await {
            return Ok(Some(Kept::Failed));
        }
        if !self.have_state().await? {
            return Ok(Some(Kept::State));
        }
        debug_assert!(asked.total <= self.client.inb.len());
        Ok(match self.what_new_has(planned) {
            Says::Serve => None,
            Says::Owed => Some(Kept::Owed),
            Says::Later => Some(Kept::Grace),
        })
    }

    fn what_new_has(&self, planned: &Planned) -> Says {
        let Read::Eligible(read) = &planned.read else { return Says::Later };
        let tables = read.tables.iter().map(|table| table.number);
        self.shared.reads.looks.ask(tables, self.world.epoch, self.serving.contact, Instant::now())
    }

    /// A session that only reads waits for a look that is late enough. True: there is one.
    async fn wait_for_look(&mut self, planned: &Planned) -> bool {
        let began = Instant::now();
        if self.serving.streak < STREAK || self.serving.rested.is_some_and(|rested| began < rested) {
            return false;
        }
        let deadline = began + GRACE;
        let mut found = false;
        while let Some(left) = deadline.checked_duration_since(Instant::now())
            && !found
        {
            self.shared.reads.looks.next(left).await;
            found = self.what_new_has(planned) != Says::Later;
        }
        let now = Instant::now();
        self.serving.rested = Some(now + (now - began) * APART);
        found
    }

    /// Logs in to a side as the client, once. False: it does not let it.
    pub(super) async fn take_place(&mut self, side: Side) -> bool {
        match self.serving.places.get(side) {
            Place::Taken(_) => return true,
            Place::Shunned(until) if Instant::now() < *until => return false,
            _ => {}
        }
        let config = self.shared.config.load_full();
        let open = open(Shared::database(&config, side), &self.login.credentials, &self.parameters, self.minor);
        match self.worker.clock.limit(config.mirror.timeout, open).await {
            Ok(Ok((conn, address, key))) => {
                let counted = self.shared.metrics.servers(side);
                counted.inc();
                let seat = Seat { conn, address, key, prepared: HashMap::new(), unwanted: 0, counted };
                *self.serving.places.get_mut(side) = Place::Taken(Box::new(seat));
                self.serving.state = State::Unknown;
                true
            }
            failed => {
                let why = failed.map_or("no answer".to_owned(), |open| open.err().unwrap_or_default());
                debug!(user = %self.user(), %side, %why, "this session's reads are not served there");
                self.shun(side);
                false
            }
        }
    }

    fn shun(&mut self, side: Side) {
        *self.serving.places.get_mut(side) = Place::Shunned(Instant::now() + SHUNNED);
    }

    /// The session there is over: the next read logs in again.
    pub(super) fn leave_place(&mut self, side: Side) {
        *self.serving.places.get_mut(side) = Place::Empty;
    }

    pub(super) fn seat(&mut self, side: Side) -> Option<&mut Seat> {
        taken(&mut self.serving, side)
    }

    /// The places that are taken have this session's settings. False: they cannot have.
    pub(super) async fn have_state(&mut self) -> Result<bool, End> {
        if self.serving.state == State::Unknown {
            self.bring_state().await?;
        }
        Ok(self.serving.state == State::Same)
    }

    /// It reads no rows: it is no contact.
    async fn bring_state(&mut self) -> Result<(), End> {
        let contact = self.serving.contact;
        if let Some(unnamed) = self.prepared.get_mut(&b""[..]) {
            // A Query takes its place.
            unnamed.there = There::Nothing;
        }
        self.ask_ours(STATE).await?;
        self.serving.contact = contact;
        self.serving.state = State::Unfit;
        let rows = std::mem::take(&mut self.kept.rows);
        if self.kept.error.take().is_some() || rows.is_empty() {
            return Ok(());
        }
        let mut set = "RESET ALL".to_owned();
        for row in &rows {
            let text = |at: usize| row.get(at).and_then(|value| std::str::from_utf8(value.as_ref()?).ok());
            match (text(0), text(1)) {
                (Some(""), Some("")) => {}
                (Some(""), _) | (_, None) | (None, _) => return Ok(()),
                (Some(name), Some(value)) => {
                    set += &format!("; SELECT pg_catalog.set_config({}, {}, false)", literal(name), literal(value));
                }
            }
        }
        let limit = self.shared.config.load().mirror.timeout;
        let clock = self.worker.clock.clone();
        for side in Side::BOTH {
            let Some(seat) = self.seat(side) else { continue };
            match clock.limit(limit, seat.query(set.as_bytes())).await {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(why))) => {
                    debug!(%side, %why, "this session's settings cannot be had there");
                    return Ok(());
                }
                // Of the settings it says nothing: the next login asks again.
                Ok(Err(_)) | Err(_) => self.shun(side),
            }
        }
        self.serving.state = State::Same;
        Ok(())
    }

    /// Asks new, and passes its answer on. False: it has not begun to answer, and the client knows of nothing.
    async fn answered_by_new(&mut self, planned: &Arc<Planned>, asked: &Asked) -> Result<bool, End> {
        let inb = self.client.inb[..asked.total].to_vec();
        let Some(seat) = self.seat(Side::New) else { return Ok(false) };
        let swallowed = seat.put(asked, &inb);
        let usual = self.cancel_at_seat(Side::New);
        let passed = self.pass_answer(Side::New, planned, asked, &swallowed).await;
        self.cancel_at(usual);
        passed
    }

    /// Passes the answer of a side on to which the read was put. `swallowed`: what comes first, by its tags. False: it has not begun to answer, and the client
    /// knows of nothing.
    pub(super) async fn pass_answer(
        &mut self,
        side: Side,
        planned: &Arc<Planned>,
        asked: &Asked,
        swallowed: &[u8],
    ) -> Result<bool, End> {
        let started = Instant::now();
        let ended = match self.answer_begins(side, swallowed).await {
            Begun::Answer => {
                self.client.inb.advance(asked.total);
                self.answer_ends(side).await
            }
            Begun::Refused { shape } => {
                if shape {
                    planned.refuse();
                }
                if let (Some(seat), Some(piped)) = (self.seat(side), &asked.piped) {
                    seat.prepared.remove(&piped.statement);
                }
                return Ok(false);
            }
            Begun::Broken => {
                // The server may have ended the session since it was last used.
                self.leave_place(side);
                return Ok(false);
            }
            Begun::Late => {
                self.abandon(side);
                return Ok(false);
            }
        };
        self.note_served(side, asked, planned);
        match ended {
            Ended::Whole => self.shared.metrics.observe_statement(side, started.elapsed().as_secs_f64()),
            Ended::Broken => {
                self.leave_place(side);
                frame::ready(&mut self.client.out, b'I');
            }
            Ended::Gone(end) => return Err(end),
        }
        Ok(true)
    }

    /// What a read that was answered leaves in our books.
    fn note_served(&mut self, side: Side, asked: &Asked, planned: &Arc<Planned>) {
        planned.see(&self.settings.application);
        self.shared.metrics.statements.with_label_values(&["pass", side.name()]).inc();
        self.portals.remove(&b""[..]);
        let Some(piped) = &asked.piped else {
            self.prepared.remove(&b""[..]);
            self.sample_query(planned, &asked.text);
            return;
        };
        let plan = Some((self.terms(), planned.clone(), asked.end));
        if piped.parses {
            let (text, types) = (Some(asked.text.clone()), piped.types.clone());
            let sets = text.as_ref().is_some_and(|text| Settings::sets(text));
            let prepared = Prepared { text, types, planned: plan, there: There::Nothing, sets };
            self.prepared.insert(piped.statement.clone(), prepared);
        } else if let Some(prepared) = self.prepared.get_mut(&piped.statement) {
            prepared.planned = plan;
        }
        if self.is_sampled(planned) {
            self.sample(planned, asked.text.clone(), Some((piped.types.clone(), piped.bind.clone())));
        }
    }

    /// A CancelRequest of the client goes to the session for reads on that side from now on: where it went before.
    pub(super) fn cancel_at_seat(&mut self, side: Side) -> Option<(Side, Address, Bytes)> {
        let client = self.cancel_key.clone()?;
        let usual = self.shared.cancels.get(&client);
        let shared = self.shared.clone();
        let seat = self.seat(side)?;
        shared.cancels.set(client, side, seat.address.clone(), seat.key.clone());
        usual
    }

    pub(super) fn cancel_at(&self, usual: Option<(Side, Address, Bytes)>) {
        if let (Some(client), Some((side, address, key))) = (&self.cancel_key, usual) {
            self.shared.cancels.set(client.clone(), side, address, key);
        }
    }

    /// The server has not answered in time: it is told to stop, and not asked again for a while.
    pub(super) fn abandon(&mut self, side: Side) {
        if let Place::Taken(seat) = std::mem::take(self.serving.places.get_mut(side)) {
            let config = self.shared.config.load_full();
            tokio::task::spawn_local(async move {
                if let Err(error) = connect::cancel(Shared::database(&config, side), &seat.address, &seat.key).await {
                    debug!(%side, %error, "a read could not be cancelled");
                }
            });
        }
        self.shun(side);
    }

    /// A statement is about to run on the authority.
    pub(super) fn note_for_serving(&mut self, planned: &Planned) {
        if planned.alters {
            self.serving.alter();
        }
    }
}

/// The session for reads on that side, if there is one.
pub(super) fn taken(serving: &mut Serving, side: Side) -> Option<&mut Seat> {
    match serving.places.get_mut(side) {
        Place::Taken(seat) => Some(seat),
        _ => None,
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.counted.dec();
    }
}

/// The payload of the frame at that place, if it is a whole one with this tag; steps over it.
fn whole<'b>(inb: &'b [u8], at: &mut usize, tag: u8) -> Result<Option<&'b [u8]>, End> {
    let Some(head) = frame::head(&inb[*at..])? else { return Ok(None) };
    if head.tag != tag || inb.len() - *at < head.total {
        return Ok(None);
    }
    let payload = &inb[*at + HEAD..*at + head.total];
    frame::check(tag, payload)?;
    *at += head.total;
    Ok(Some(payload))
}

/// Logs in as the client; whatever it begins there is READ ONLY, whatever it resets.
async fn open(
    db: &crate::config::Database,
    credentials: &crate::auth::Credentials,
    parameters: &[(Bytes, Bytes)],
    minor: u16,
) -> Result<(Conn<Stream>, Address, Bytes), String> {
    let parameters = read_only(to_database(parameters, &db.database));
    let connected = connect::connect(db, credentials, &parameters, minor).await.map_err(|error| error.to_string())?;
    let mut conn = Conn::new(connected.stream, connected.buf);
    let key = greeted(&mut conn).await?;
    Ok((conn, connected.address, key))
}

impl Seat {
    /// Runs statements of ours. Returns what the server refused, if it did; an error where it was cut off.
    async fn query(&mut self, text: &[u8]) -> io::Result<Option<String>> {
        frame::query(&mut self.conn.out, text);
        let mut refused = None;
        loop {
            let (tag, payload) = self.conn.frame().await?;
            match tag {
                b'E' => refused = Some(frame::server_error(&payload).message),
                b'Z' => return Ok(refused),
                _ => {}
            }
        }
    }

    /// Sends a read; says which answers to messages of ours come first, by their tags.
    pub(super) fn put(&mut self, asked: &Asked, inb: &[u8]) -> Vec<u8> {
        let mut ours = Vec::new();
        let out: &mut BytesMut = &mut self.conn.out;
        let Some(piped) = &asked.piped else {
            self.prepared.remove(&b""[..]);
            out.extend_from_slice(inb);
            return ours;
        };
        let known = self.prepared.get(&piped.statement);
        let there = known == Some(&asked.text) && !piped.statement.is_empty();
        if self.prepared.len() >= PREPARED_MAX
            && !there
            && let Some(other) = self.prepared.keys().next().cloned()
        {
            self.prepared.remove(&other);
            frame::close_statement(out, &other);
            ours.push(b'3');
        }
        if (!there || piped.parses) && !piped.statement.is_empty() {
            // There may be another one of that name.
            frame::close_statement(out, &piped.statement);
            ours.push(b'3');
        }
        self.prepared.insert(piped.statement.clone(), asked.text.clone());
        if piped.parses {
            out.extend_from_slice(inb);
            return ours;
        }
        if !there {
            ours.push(b'1');
            frame::put(out, b'P', |out| {
                out.extend_from_slice(&piped.statement);
                out.extend_from_slice(b"\0");
                out.extend_from_slice(&asked.text);
                out.extend_from_slice(b"\0");
                out.extend_from_slice(&piped.types);
            });
        }
        out.extend_from_slice(&inb[piped.rest..]);
        ours
    }
}
