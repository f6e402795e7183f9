//! The admin console: any PostgreSQL client, database name `crossfade`. pgwire's server serves it, over a pair of sockets: the client has logged in to
//! us already, and what pgwire makes of a malformed message ends this console and nothing else.

mod command;
mod tables;

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::{Sink, stream};
use pgwire::api::auth::StartupHandler;
use pgwire::api::auth::noop::NoopStartupHandler;
use pgwire::api::portal::{Format, Portal};
use pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use pgwire::api::results::{DataRowEncoder, FieldFormat, FieldInfo, QueryResponse, Response, Tag};
use pgwire::api::stmt::{QueryParser, StoredStatement};
use pgwire::api::store::PortalStore;
use pgwire::api::{ClientInfo, ClientPortalStore, PgWireServerHandlers, Type};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::PgWireBackendMessage;
use tokio::io::AsyncWriteExt;
use tracing::{debug, info, warn};

use self::command::{Command, Set};
use self::tables::Table;
use crate::config::Config;
use crate::phase::Phase;
use crate::shared::{Shared, lock};
use crate::switch::gates;
use crate::switch::mover::{self, Stays};
use crate::switch::record::{self, Ask};
use crate::wire::startup::Startup;

/// Its database name.
const DATABASE: &[u8] = b"crossfade";

/// The connection is meant for the console. A migrating database of that name goes before it.
pub fn is_meant(config: &Config, startup: &Startup) -> bool {
    &startup.database()[..] == DATABASE && config.old.database.as_bytes() != DATABASE
}

/// Serves an operator who has logged in, to the end.
pub async fn serve(shared: Arc<Shared>, mut startup: Startup, user: String) {
    let Ok((mut ours, theirs)) = tokio::net::UnixStream::pair() else { return };
    let console = Console { shared, user: user.clone() };
    let served = tokio::spawn(pgwire::tokio::process_socket_unix(theirs, console));
    let mut greeting = BytesMut::new();
    let parameters = [b"user".as_slice(), user.as_bytes(), b"database", DATABASE];
    let length = 9 + parameters.iter().map(|part| part.len() + 1).sum::<usize>();
    greeting.extend_from_slice(&(length as u32).to_be_bytes());
    greeting.extend_from_slice(&0x0003_0000_u32.to_be_bytes());
    for part in parameters {
        greeting.extend_from_slice(part);
        greeting.extend_from_slice(b"\0");
    }
    greeting.extend_from_slice(b"\0");
    greeting.extend_from_slice(&startup.buf);
    if ours.write_all(&greeting).await.is_ok() {
        let ended = tokio::io::copy_bidirectional(&mut startup.stream, &mut ours).await;
        debug!(%user, ?ended, "a console was left");
    }
    served.abort();
}

/// One operator's console.
struct Console {
    shared: Arc<Shared>,
    user: String,
}

/// What a command answers.
enum Answer {
    Table(Table),
    Done(&'static str),
    /// Of what a driver calls a transaction.
    Begun(&'static str),
    Ended(&'static str),
}

/// An error for the operator.
fn refused(code: &str, message: String) -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new("ERROR".into(), code.into(), message)))
}

impl Console {
    async fn carry_out(&self, command: Command) -> PgWireResult<Answer> {
        let shared = &self.shared;
        Ok(match command {
            Command::Show(show) => {
                let shown = tables::show(shared, show).await;
                Answer::Table(shown.map_err(|error| refused("58000", error))?)
            }
            Command::Set(set) => return self.set_phase(set).await,
            // psql and drivers send some by themselves.
            Command::SetOther => Answer::Done("SET"),
            Command::Transaction { tag, begins: true } => Answer::Begun(tag),
            Command::Transaction { tag, begins: false } => Answer::Ended(tag),
            Command::Reload => {
                let mut reloaded = std::pin::pin!(shared.reloaded.notified());
                reloaded.as_mut().enable();
                shared.reload.notify_one();
                reloaded.await;
                if let Some(error) = lock(&shared.config_error).clone() {
                    return Err(refused("F0000", format!("{error}; the settings of before stay in force")));
                }
                Answer::Done("RELOAD")
            }
            Command::Pause => {
                info!(user = %self.user, "paused from the console");
                shared.gate.pause();
                shared.gate.drained().await;
                Answer::Done("PAUSE")
            }
            Command::Resume => {
                info!(user = %self.user, "resumed from the console");
                shared.gate.resume();
                Answer::Done("RESUME")
            }
            Command::Shutdown => {
                warn!(user = %self.user, "shut down from the console");
                shared.shutdown.notify_one();
                Answer::Done("SHUTDOWN")
            }
        })
    }

    /// Moves, one step after another; an error says what is in the way, and its detail names each closed gate.
    async fn set_phase(&self, set: Set) -> PgWireResult<Answer> {
        let shared = &self.shared;
        if set.dry_run {
            let shown = tables::gates(shared, Some(set.phase), &set.force).await;
            return shown.map(Answer::Table).map_err(|error| refused("58000", error));
        }
        let listen = shared.config.load().listen;
        let who = format!("console of the proxy on {listen} ({}), {}", record::machine(), self.user);
        let ask = Ask { who, why: set.reason, force: set.force, terminate: set.terminate };
        // An operator who hangs up must not leave a move half done, with clients held.
        let moving = tokio::spawn(move_to(shared.clone(), set.phase, ask));
        match moving.await {
            Ok(Ok(())) => Ok(Answer::Done("SET")),
            Ok(Err(stays)) => Err(in_the_way(set.phase, &stays)),
            Err(error) => Err(refused("XX000", format!("the move has failed: {error}; look at SHOW PHASE"))),
        }
    }

    async fn answer(&self, text: &str, format: &Format) -> PgWireResult<Response> {
        let command = command::read(text).map_err(|error| refused("42601", error))?;
        Ok(match self.carry_out(command).await? {
            Answer::Done(tag) => Response::Execution(Tag::new(tag)),
            Answer::Begun(tag) => Response::TransactionStart(Tag::new(tag)),
            Answer::Ended(tag) => Response::TransactionEnd(Tag::new(tag)),
            Answer::Table(table) => {
                let fields = Arc::new(fields(table.columns, format));
                let mut rows = Vec::with_capacity(table.rows.len());
                for row in &table.rows {
                    let mut encoder = DataRowEncoder::new(fields.clone());
                    for value in row {
                        encoder.encode_field(value)?;
                    }
                    rows.push(Ok(encoder.take_row()));
                }
                let mut response = QueryResponse::new(fields, stream::iter(rows));
                response.command_tag = "SHOW".to_owned();
                Response::Query(response)
            }
        })
    }
}

async fn move_to(shared: Arc<Shared>, want: Phase, ask: Ask) -> Result<(), Stays> {
    let _switching = shared.switching.lock().await;
    while shared.world.load().phase != want {
        mover::step(&shared, want, &ask).await?;
    }
    // What the file asked for before is not what the operator wants now.
    *lock(&shared.intent) = None;
    shared.wanted.notify_one();
    Ok(())
}

fn in_the_way(to: Phase, stays: &Stays) -> PgWireError {
    let mut info = ErrorInfo::new("ERROR".into(), "55000".into(), stays.error.to_string());
    let closed: Vec<String> = gates::closed(&stays.gates).iter().map(|gate| format!("{}: {gate}", gate.gate)).collect();
    info.detail = (!closed.is_empty()).then(|| closed.join("\n"));
    info.hint = Some(format!("SHOW GATES {to} shows all of them. FORCE and REASON override those that can be."));
    PgWireError::UserError(Box::new(info))
}

/// All columns are text.
fn fields(columns: &[&str], format: &Format) -> Vec<FieldInfo> {
    let field =
        |(at, name): (usize, &&str)| FieldInfo::new((*name).to_owned(), None, None, Type::TEXT, format.format_for(at));
    columns.iter().enumerate().map(field).collect()
}

impl PgWireServerHandlers for Console {
    fn simple_query_handler(&self) -> Arc<impl SimpleQueryHandler> {
        Arc::new(Console { shared: self.shared.clone(), user: self.user.clone() })
    }

    fn extended_query_handler(&self) -> Arc<impl ExtendedQueryHandler> {
        Arc::new(Console { shared: self.shared.clone(), user: self.user.clone() })
    }

    fn startup_handler(&self) -> Arc<impl StartupHandler> {
        Arc::new(Welcome)
    }
}

/// The operator has logged in to us.
struct Welcome;

impl NoopStartupHandler for Welcome {}

#[async_trait]
impl SimpleQueryHandler for Console {
    async fn do_query<C>(&self, _client: &mut C, query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        Ok(vec![self.answer(query, &Format::UnifiedText).await?])
    }
}

#[async_trait]
impl ExtendedQueryHandler for Console {
    type Statement = String;
    type QueryParser = Texts;

    fn query_parser(&self) -> Arc<Texts> {
        Arc::new(Texts)
    }

    async fn do_query<C>(&self, _client: &mut C, portal: &Portal<String>, _max_rows: usize) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = String>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let statement: &StoredStatement<String> = &portal.statement;
        self.answer(&statement.statement, &portal.result_column_format).await
    }
}

/// Commands are kept as they were written: what they answer with is known from their text.
struct Texts;

#[async_trait]
impl QueryParser for Texts {
    type Statement = String;

    async fn parse_sql<C>(&self, _client: &C, sql: &str, _types: &[Option<Type>]) -> PgWireResult<Option<String>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        command::read(sql).map_err(|error| refused("42601", error))?;
        Ok(Some(sql.to_owned()))
    }

    fn get_parameter_types(&self, _statement: &String) -> PgWireResult<Vec<Type>> {
        Ok(Vec::new())
    }

    fn get_result_schema(&self, statement: &String, format: Option<&Format>) -> PgWireResult<Vec<FieldInfo>> {
        let columns: &[&str] = match command::read(statement) {
            Ok(Command::Show(show)) => tables::columns(show),
            Ok(Command::Set(Set { dry_run: true, .. })) => &tables::GATES,
            _ => &[],
        };
        Ok(columns
            .iter()
            .enumerate()
            .map(|(at, name)| {
                let format = format.map_or(FieldFormat::Text, |format| format.format_for(at));
                FieldInfo::new((*name).to_owned(), None, None, Type::TEXT, format)
            })
            .collect())
    }
}
