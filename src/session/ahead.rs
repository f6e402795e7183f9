//! A session logs in to the side that is about to be authority while its client is still served where it is (`switch::ahead`).

use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

use super::{End, Session, carry};
use crate::backend::connect::Address;
use crate::phase::Side;
use crate::switch::ahead;
use crate::wire::conn::Conn;
use crate::wire::stream::Stream;

/// A login takes no longer, once the server has let us in.
const GREETING: Duration = Duration::from_secs(5);
/// The end of a server's greeting: ReadyForQuery.
const READY: &[u8] = b"Z\0\0\0\x05I";

/// A login on the other side that nobody uses yet.
pub(super) struct Ahead {
    side: Side,
    login: AbortOnDropHandle<Option<Seat>>,
    _tried: std::rc::Rc<std::cell::RefCell<Option<ahead::Tried>>>,
}

/// A server session with its whole greeting in its buffer.
pub(super) struct Seat {
    pub(super) conn: Conn<Stream>,
    pub(super) address: Address,
}

impl Seat {
    /// The server has said nothing since its greeting: it has neither closed the connection nor changed a parameter.
    fn is_fresh(&mut self) -> bool {
        matches!(self.conn.poll_fill(&mut Context::from_waker(Waker::noop())), Poll::Pending)
    }
}

impl Session {
    /// Called, between two transactions: begins to log in where the authority is about to be, or gives that up. What is asked when the session moves is asked
    /// once now, so that the server has at hand what it needs for it.
    pub(super) async fn look_ahead(&mut self) -> Result<(), End> {
        let side = self.shared.ahead.side().filter(|side| *side != self.side);
        if side == self.ahead.as_ref().map(|ahead| ahead.side) {
            return Ok(());
        }
        self.ahead = None;
        let Some(side) = side else { return Ok(()) };
        let (shared, login) = (self.shared.clone(), self.login.clone());
        let (parameters, minor) = (self.parameters.clone(), self.minor);
        let counted = std::rc::Rc::new(std::cell::RefCell::new(None));
        let tried = counted.clone();
        let login = tokio::task::spawn_local(async move {
            let logged_in = async {
                let connected = carry::connect(&shared, side, &login, &parameters, minor).await.ok()?;
                let mut conn = Conn::new(connected.stream, connected.buf);
                let greeting = async {
                    while !conn.inb.ends_with(READY) {
                        conn.fill().await.ok()?;
                    }
                    Some(())
                };
                tokio::time::timeout(GREETING, greeting).await.ok()??;
                Some(Seat { conn, address: connected.address })
            };
            let seat = logged_in.await;
            *tried.borrow_mut() = Some(ahead::Ahead::count(&shared));
            seat
        });
        self.ahead = Some(Ahead { side, login: AbortOnDropHandle::new(login), _tried: counted });
        self.ask_what_moves().await
    }

    /// The login on that side, if there is one and the server still has it.
    pub(super) async fn ahead_on(&mut self, side: Side) -> Option<Seat> {
        let ahead = self.ahead.take().filter(|ahead| ahead.side == side)?;
        ahead.login.await.ok().flatten().and_then(|mut seat| seat.is_fresh().then_some(seat))
    }
}
