//! Accepting clients, and the threads that serve them.
//!
//! Each thread runs its own single-threaded runtime: a session's client, its server and its mirror are woken on one core, and no task moves.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::logins::Logins;
use super::{RunError, Stop, console};
use crate::auth::client::{Login, authenticate};
use crate::backend::connect;
use crate::config::Config;
use crate::phase::Side;
use crate::session::Session;
use crate::shared::{Shared, Worker};
use crate::wire::frame::Report;
use crate::wire::startup::{Accepted, Startup, accept};
use crate::wire::tls::ServerTls;

/// How long the end waits for what is bounded neither by clients nor by us.
const FAREWELL: Duration = Duration::from_secs(5);

/// The certificate for clients, if the file names one.
pub fn tls(config: &Config) -> Result<Option<Arc<ServerTls>>, RunError> {
    match &config.tls {
        None => Ok(None),
        Some(tls) => {
            Ok(Some(Arc::new(ServerTls::load(&tls.certificate, &tls.key, tls.client_ca.as_deref(), tls.required)?)))
        }
    }
}

/// Binds a port.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, RunError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(1024)
    };
    listen().map_err(|error| RunError::Listen { address, error })
}

/// Clients of this proxy, counted from accept to end.
#[derive(Default)]
struct Counts {
    clients: AtomicUsize,
    logins: Logins,
}

struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn within(counter: &'a AtomicUsize, limit: usize) -> Option<Counted<'a>> {
        let counted = Counted(counter);
        (counter.fetch_add(1, Ordering::SeqCst) < limit).then_some(counted)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Serves clients until it is told to stop, then lets transactions end.
pub async fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
    mut stopping: watch::Receiver<Stop>,
) -> Result<(), RunError> {
    let config = shared.config.load_full();
    let threads = match config.limits.threads {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        threads => threads,
    };
    let counts = Arc::new(Counts::default());
    let mut senders = Vec::new();
    for number in 0..threads {
        let (sender, receiver) = mpsc::unbounded_channel();
        senders.push(sender);
        thread(
            number,
            receiver,
            shared.clone(),
            counts.clone(),
            tokio::runtime::Handle::current(),
            config.mirror.connections.div_ceil(threads),
        )
        .map_err(RunError::Threads)?;
    }
    info!(listen = %config.listen, threads, "serving clients");
    shared.ready.store(true, Ordering::SeqCst);
    let mut turn = 0;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    turn = (turn + 1) % senders.len();
                    // The stream is registered anew in the runtime of its thread.
                    if let Ok(stream) = stream.into_std() {
                        let _ = senders[turn].send(stream);
                    }
                }
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            _ = stopping.wait_for(|stop| *stop != Stop::No) => break,
        }
    }
    drop(listener);
    shared.ready.store(false, Ordering::SeqCst);
    info!("no new clients are served; transactions under way may end");
    shared.gate.shut();
    shared.aside.shut();
    shared.call();
    tokio::select! {
        () = drained(&shared) => {}
        _ = stopping.wait_for(|stop| *stop == Stop::Now) => {}
    }
    Ok(())
}

/// Transactions have ended, sessions have said goodbye, and what was answered by the mirror is cleared. The last two are bounded: a client
/// may not read, the mirror may be down, and debts that stay in the ledger are paid after the next start.
async fn drained(shared: &Shared) {
    shared.gate.drained().await;
    shared.aside.drained().await;
    let rest = async {
        while shared.metrics.clients.get() > 0 || !shared.paid.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let _ = tokio::time::timeout(FAREWELL, rest).await;
}

/// Calls one thread's sessions, whenever there is a reason. Each that moves to another authority logs in there: not all at once. Where the authority is about to
/// change, sessions that will mirror are opened, too.
async fn call(worker: Rc<Worker>) {
    let mut calls = worker.shared.calls.subscribe();
    while calls.changed().await.is_ok() {
        for bell in worker.bells.hanging() {
            bell.ring();
            if !worker.shared.gate.is_shut() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let phase = worker.shared.world.load().phase;
        let coming = worker.shared.ahead.side().filter(|side| *side != phase.authority());
        if coming.is_none() {
            worker.pools.get(phase.authority()).empty();
        }
        if let Some(side) = coming {
            let worker = worker.clone();
            tokio::task::spawn_local(async move {
                let config = worker.shared.config.load_full();
                let wanted = worker.pools.get(side).sessions();
                worker.pools.get(side.other()).fill(Shared::database(&config, side.other()), wanted).await;
            });
        }
    }
}

fn thread(
    number: usize,
    mut streams: mpsc::UnboundedReceiver<std::net::TcpStream>,
    shared: Arc<Shared>,
    counts: Arc<Counts>,
    jobs: tokio::runtime::Handle,
    mirrors: usize,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("sessions-{number}")).spawn(move || {
        let local = tokio::task::LocalSet::new();
        let worker = Rc::new(Worker::new(shared, mirrors));
        runtime.block_on(local.run_until(async move {
            tokio::task::spawn_local(call(worker.clone()));
            while let Some(stream) = streams.recv().await {
                let (worker, counts, jobs) = (worker.clone(), counts.clone(), jobs.clone());
                tokio::task::spawn_local(async move {
                    match TcpStream::from_std(stream) {
                        Ok(stream) => client(worker, stream, counts, jobs).await,
                        Err(error) => warn!(%error, "a connection could not be served"),
                    }
                });
            }
        }));
    })?;
    Ok(())
}

/// One connection from its first byte to its last.
async fn client(worker: Rc<Worker>, tcp: TcpStream, counts: Arc<Counts>, jobs: tokio::runtime::Handle) {
    let shared = worker.shared.clone();
    let config = shared.config.load_full();
    let tls = shared.tls.load_full();
    let login = counts.logins.enter(config.limits.logins);
    let served = async {
        let startup = greet(&shared, &config, tcp, tls.as_deref()).await?;
        if console::is_meant(&config, &startup) {
            // Beside the sessions: a move must not hold up the clients of this thread.
            if let Some((startup, user)) = admit_operator(&shared, &config, startup).await {
                jobs.spawn(console::serve(shared.clone(), startup, user));
            }
            return None;
        }
        admit(&shared, &config, &counts, startup).await
    };
    let admitted = tokio::select! {
        biased;
        admitted = served => admitted,
        () = login.over() => return debug!("too many connections that have not logged in; the one that has waited longest was closed"),
    };
    drop(login);
    let Some((startup, login, _place)) = admitted else { return };
    let user = login.user.clone();
    shared.metrics.clients.inc();
    match Session::open(worker, startup, login).await {
        Ok(session) => session.run().await,
        Err((startup, report)) => {
            warn!(user = %String::from_utf8_lossy(&user), message = %report.message, "no session for a client");
            refuse(*startup, &report).await;
        }
    }
    shared.metrics.clients.dec();
}

/// What a connection wants; None: nothing, or it was carried out.
async fn greet(shared: &Shared, config: &Config, tcp: TcpStream, tls: Option<&ServerTls>) -> Option<Startup> {
    match tokio::time::timeout(config.limits.login, accept(tcp, tls)).await {
        Ok(Ok(Accepted::Session(startup))) => return Some(startup),
        Ok(Ok(Accepted::Cancel { key, stream })) => {
            cancel(shared, &key).await;
            drop(stream);
        }
        Ok(Ok(Accepted::Closed)) => {}
        Ok(Err(error)) => debug!(%error, "a connection did not become a session"),
        Err(_) => debug!("a connection did not say what it wants in time"),
    }
    None
}

/// Logs a client in, with its place among the clients. None: it was refused, and told why.
async fn admit<'a>(
    shared: &Shared,
    config: &Config,
    counts: &'a Counts,
    mut startup: Startup,
) -> Option<(Startup, Login, Counted<'a>)> {
    let Some(place) = Counted::within(&counts.clients, config.limits.clients) else {
        let hint = "Raise limits.clients in crossfade's file, or close some connections.";
        refuse(startup, &Report::fatal("53300", "sorry, too many clients already", hint)).await;
        return None;
    };
    if let Some(report) = unsuited(shared, config, &startup) {
        refuse(startup, &report).await;
        return None;
    }
    let verifiers = shared.verifiers.load_full();
    let authenticated = authenticate(&mut startup, config.auth, &verifiers);
    match tokio::time::timeout(config.limits.login, authenticated).await {
        Ok(Ok(login)) => return Some((startup, login, place)),
        Ok(Err(error)) => debug!(%error, "a login failed"),
        Err(_) => debug!("a login took too long"),
    }
    None
}

/// Logs an operator in. None: it was refused, and told why.
async fn admit_operator(shared: &Shared, config: &Config, mut startup: Startup) -> Option<(Startup, String)> {
    let verifiers = shared.verifiers.load_full();
    let authenticated = authenticate(&mut startup, config.auth, &verifiers);
    let login = match tokio::time::timeout(config.limits.login, authenticated).await {
        Ok(Ok(login)) => login,
        _ => return None,
    };
    let user = String::from_utf8_lossy(&login.user).into_owned();
    if !login.credentials.checked {
        let hint =
            "Let the control role read pg_authid, or name the role and its password in `users` of crossfade's file.";
        refuse(startup, &Report::fatal("28000", "crossfade could not check this role's password itself", hint)).await;
        return None;
    }
    if config.admins.contains(&user) {
        return Some((startup, user));
    }
    let hint = "Name it in `admins` of crossfade's file.";
    refuse(startup, &Report::fatal("42501", format!("role {user:?} may not use the admin console"), hint)).await;
    None
}

/// What this phase does not offer.
fn unsuited(shared: &Shared, config: &Config, startup: &Startup) -> Option<Report> {
    let phase = shared.world.load().phase;
    if crate::session::replicates(&startup.parameters) && phase != crate::phase::Phase::Old {
        return Some(Report::fatal(
            "0A000",
            format!("replication connections are not served in phase {phase}"),
            "Connect to the database directly for replication; crossfade passes it on in phase old only.",
        ));
    }
    let database = startup.database();
    let ours = database == Shared::database(config, Side::Old).database.as_bytes();
    if !ours && config.other_databases == crate::config::OtherDatabases::Refuse {
        return Some(Report::fatal(
            "3D000",
            format!("database {:?} does not take part in this migration", String::from_utf8_lossy(&database)),
            format!("Connect to {:?}, or set other_databases: pass.", config.old.database),
        ));
    }
    None
}

async fn refuse(mut startup: Startup, report: &Report) {
    use tokio::io::AsyncWriteExt;
    let mut out = bytes::BytesMut::new();
    report.put(&mut out);
    let _ = tokio::time::timeout(Duration::from_secs(5), startup.stream.write_all(&out)).await;
    let _ = startup.stream.shutdown().await;
}

async fn cancel(shared: &Shared, key: &bytes::Bytes) {
    let Some((side, address, server_key)) = shared.cancels.get(key) else { return };
    let config = shared.config.load_full();
    let asked = connect::cancel(Shared::database(&config, side), &address, &server_key).await;
    if let Err(error) = asked {
        debug!(%error, "a CancelRequest could not be passed on");
    }
}
