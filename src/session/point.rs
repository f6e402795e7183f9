//! Reads of one row of a lazy table by its key (`plan::point`): both sides are asked at once, and whether new speaks for the key says which answer holds.
//! Over sessions for reads, as in `served`. docs/protocols.md, *Lazy*.

use std::borrow::Cow;
use std::task::Poll;

use bytes::{Buf, Bytes};

use super::served::{Asked, Seat};
use super::{End, Session};
use crate::phase::Side;
use crate::plan::lazy::Lazy;
use crate::plan::point::Spoken;
use crate::wire::conn::Conn;
use crate::wire::frame::{self, Fields};
use crate::wire::stream::Stream;

const SPOKEN_NAME: &[u8] = b"crossfade_spoken";
/// A larger message that nobody wants is not waited for, in bytes.
const LARGE: usize = 1 << 20;

/// Whether new speaks for the key.
enum Speaks {
    Yes,
    No,
    /// It cannot be asked.
    Refused,
    /// It did not answer.
    Unsaid,
}

impl Session {
    /// Answers the read that begins the client's buffer, where it is one of these. False: nothing has happened, and it is merged.
    pub(super) async fn read_point(&mut self, head: frame::Head) -> Result<bool, End> {
        let Some(mut asked) = self.asked(head)? else { return Ok(false) };
        let planned = self.plan_of(&mut asked);
        let Lazy::Merged(merged) = &planned.lazy else { return Ok(false) };
        let Some(point) = &merged.point else { return Ok(false) };
        // The question takes the key from the text: one that is masked is not what the client has written.
        let Cow::Borrowed(text) = self.legible(&asked.text) else { return Ok(false) };
        if planned.is_refused() || self.settings.role_changed {
            return Ok(false);
        }
        let types = asked.piped.as_ref().map(|piped| declared(&piped.types)).unwrap_or_default();
        let Some(spoken) = point.spoken(text, &types) else { return Ok(false) };
        if !self.shared.health.get(Side::New).up() || !self.take_place(Side::New).await {
            return Ok(false);
        }
        let both = self.shared.health.get(Side::Old).up() && self.take_place(Side::Old).await;
        if !self.have_state().await? || !self.quiet(Side::New).await {
            return Ok(false);
        }
        // An answer that still comes is not waited for: new may speak for the key.
        let both = both && self.is_quiet(Side::Old).await;
        let inb = self.client.inb[..asked.total].to_vec();
        let Some(seat) = self.seat(Side::New) else { return Ok(false) };
        if ask_for(seat, &spoken, &asked).is_none() {
            return Ok(false);
        }
        let on_new = seat.put(&asked, &inb);
        let on_old = match self.seat(Side::Old).filter(|_| both) {
            Some(seat) => {
                let swallowed = seat.put(&asked, &inb);
                // What goes wrong is found when its answer is read.
                let _ = std::future::poll_fn(|cx| Poll::Ready(seat.conn.poll_flush(cx))).await;
                Some(swallowed)
            }
            None => None,
        };
        let usual = self.cancel_at_seat(Side::New);
        let answered = match (self.speaks().await, on_old) {
            (Speaks::Yes, on_old) => {
                let answered = self.pass_answer(Side::New, &planned, &asked, &on_new).await;
                self.count_answer(Side::New, &answered);
                if on_old.is_some() {
                    self.unwanted(Side::Old);
                    self.is_quiet(Side::Old).await;
                }
                answered
            }
            (Speaks::No, Some(on_old)) => {
                self.unwanted(Side::New);
                self.cancel_at_seat(Side::Old);
                let answered = self.pass_answer(Side::Old, &planned, &asked, &on_old).await;
                self.count_answer(Side::Old, &answered);
                answered
            }
            (speaks, on_old) => {
                if matches!(speaks, Speaks::Refused) {
                    planned.refuse();
                }
                self.unwanted(Side::New);
                if on_old.is_some() {
                    self.unwanted(Side::Old);
                }
                Ok(false)
            }
        };
        self.cancel_at(usual);
        answered
    }

    fn count_answer(&self, side: Side, answered: &Result<bool, End>) {
        if matches!(answered, Ok(true)) {
            self.shared.metrics.lazy_reads.with_label_values(&[side.name()]).inc();
        }
    }

    /// What new says of the key.
    async fn speaks(&mut self) -> Speaks {
        let limit = self.shared.config.load().mirror.timeout;
        let clock = self.worker.clock.clone();
        let Some(seat) = self.seat(Side::New) else { return Speaks::Unsaid };
        match clock.limit(limit, said(&mut seat.conn)).await {
            Ok(Ok(Some(true))) => Speaks::Yes,
            Ok(Ok(Some(false))) => Speaks::No,
            Ok(Ok(None)) => {
                seat.prepared.remove(SPOKEN_NAME);
                Speaks::Refused
            }
            Ok(Err(_)) => {
                self.leave_place(Side::New);
                Speaks::Unsaid
            }
            Err(_) => {
                self.abandon(Side::New);
                Speaks::Unsaid
            }
        }
    }

    fn unwanted(&mut self, side: Side) {
        if let Some(seat) = self.seat(side) {
            seat.unwanted += 1;
        }
    }

    /// Waits for what is unwanted of that side. False: it does not come.
    async fn quiet(&mut self, side: Side) -> bool {
        let limit = self.shared.config.load().mirror.timeout;
        let clock = self.worker.clock.clone();
        loop {
            if self.is_quiet(side).await {
                return true;
            }
            let Some(seat) = self.seat(side) else { return false };
            match clock.limit(limit, seat.conn.fill()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => {
                    self.leave_place(side);
                    return false;
                }
                Err(_) => {
                    self.abandon(side);
                    return false;
                }
            }
        }
    }

    /// Passes over what has come that nobody wants. True: all of it has, and the next answer is the next question's.
    async fn is_quiet(&mut self, side: Side) -> bool {
        loop {
            let Some(seat) = self.seat(side) else { return false };
            match passed_over(seat) {
                Some(true) => return true,
                Some(false) => {}
                None => {
                    self.abandon(side);
                    return false;
                }
            }
            match std::future::poll_fn(|cx| Poll::Ready(seat.conn.poll_fill(cx))).await {
                Poll::Pending => return false,
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(_) => {
                    self.leave_place(side);
                    return false;
                }
            }
        }
    }
}

/// Passes over whole messages. True: the last one was the end of the last answer that is not wanted. None: they are not worth it.
fn passed_over(seat: &mut Seat) -> Option<bool> {
    while seat.unwanted > 0 {
        let head = match frame::head(&seat.conn.inb) {
            Ok(Some(head)) if head.fits_server() && head.total <= LARGE => head,
            Ok(None) => return Some(false),
            _ => return None,
        };
        if seat.conn.inb.len() < head.total {
            return Some(false);
        }
        seat.conn.inb.advance(head.total);
        seat.unwanted -= usize::from(head.tag == b'Z');
    }
    Some(true)
}

/// The question's answer, up to its ReadyForQuery. None: it is an error.
async fn said(conn: &mut Conn<Stream>) -> std::io::Result<Option<bool>> {
    let (mut said, mut failed) = (None, false);
    loop {
        let (tag, payload) = conn.frame().await?;
        match tag {
            b'D' => {
                let mut fields = Fields::new(&payload);
                let value = fields.int16().ok().and_then(|_| fields.value().ok().flatten());
                said = Some(value == Some(b"t"));
            }
            b'E' => failed = true,
            b'Z' => return Ok(said.filter(|_| !failed)),
            _ => {}
        }
    }
}

/// Types of parameters as Parse has them.
fn declared(types: &[u8]) -> Vec<u32> {
    let mut fields = Fields::new(types);
    let Ok(count) = fields.count() else { return Vec::new() };
    (0..count).map_while(|_| fields.int32().ok()).map(|oid| oid.cast_unsigned()).collect()
}

/// Puts the question to new, in front of the read. None: the read's Bind is not as it must be.
fn ask_for(seat: &mut Seat, spoken: &Spoken, asked: &Asked) -> Option<()> {
    let mut types = Vec::new();
    let (mut formats, mut values) = (Vec::new(), Vec::new());
    if let Some(piped) = &asked.piped {
        let all = declared(&piped.types);
        let bound = Bound::read(&piped.bind)?;
        for &number in &spoken.parameters {
            let at = number.checked_sub(1)?;
            types.push(all.get(at).copied().unwrap_or(0));
            formats.push(bound.format(at)?);
            values.push(*bound.values.get(at)?);
        }
    }
    if types.len() < spoken.parameters.len() {
        return None;
    }
    // With literals in it a text is seldom asked twice.
    let name = if types.is_empty() { b"" } else { SPOKEN_NAME };
    let out = &mut seat.conn.out;
    let known = !name.is_empty() && seat.prepared.get(name).is_some_and(|known| *known == spoken.text.as_bytes());
    if !known {
        if seat.prepared.remove(name).is_some() && !name.is_empty() {
            frame::close_statement(out, name);
        }
        frame::parse(out, name, spoken.text.as_bytes(), &types);
        if !name.is_empty() {
            seat.prepared.insert(Bytes::from_static(SPOKEN_NAME), spoken.text.clone().into());
        }
    }
    frame::bind(out, b"", name, &formats, values.iter().copied(), 0);
    frame::execute(out, b"");
    frame::sync(out);
    Some(())
}

/// What a Bind gives.
struct Bound<'b> {
    formats: Vec<i16>,
    values: Vec<Option<&'b [u8]>>,
}

impl Bound<'_> {
    fn read(bind: &[u8]) -> Option<Bound<'_>> {
        let mut fields = Fields::new(bind);
        fields.string().ok()?;
        fields.string().ok()?;
        let formats = (0..fields.count().ok()?).map(|_| fields.int16().ok()).collect::<Option<_>>()?;
        let values = (0..fields.count().ok()?).map(|_| fields.value().ok()).collect::<Option<_>>()?;
        Some(Bound { formats, values })
    }

    fn format(&self, at: usize) -> Option<i16> {
        match self.formats[..] {
            [] => Some(0),
            [all] => Some(all),
            ref each => each.get(at).copied(),
        }
    }
}
