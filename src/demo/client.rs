//! One client of the application: what it does, and what it remembers having been told.

use std::fmt;

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::json;
use tokio_postgres::{Config, Statement};

use super::acks::{Acknowledged, Written};
use super::load::connect;
use super::schema::{ALL_USERS, OWNED_USERS, SEEDED_PHOTOS, Table};

/// Why an operation failed.
#[derive(Debug)]
pub enum Failure {
    /// The server (or the proxy) said so, or the connection broke.
    Server {
        /// What the client was doing.
        doing: &'static str,
        /// What came back.
        error: tokio_postgres::Error,
    },
    /// An answer that cannot be right: another number of rows, or a row that is not what was acknowledged.
    Wrong(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Server { doing, error } => match error.as_db_error() {
                Some(said) => write!(f, "{doing}: {} ({})", said.message(), said.code().code()),
                None => write!(f, "{doing}: {error}"),
            },
            Failure::Wrong(what) => f.write_str(what),
        }
    }
}

/// A client with its connection and its memory.
pub struct Client {
    number: i64,
    server: Config,
    session: Option<Session>,
    tokens: i64,
    photos: Vec<Photo>,
    /// What it was told is committed.
    pub acknowledged: Acknowledged,
}

/// A photo that the client has uploaded and not deleted.
struct Photo {
    id: String,
    token: i64,
    attachments: Vec<i64>,
    comments: Vec<i64>,
}

/// A connection with its prepared statements: they are prepared once and live through every phase.
struct Session {
    connection: tokio_postgres::Client,
    upload: Statement,
    attach: Statement,
    edit: Statement,
    comment: Statement,
    like: Statement,
    read: Statement,
    log: Statement,
    seeded: Vec<String>,
}

const UPLOAD: &str = "INSERT INTO photos (owner, path, caption, audience, tags, exif, token)
    VALUES ($1, $2, $3, $4::text::audience, ARRAY['new', $5::text], $6, $7) RETURNING id::text";
const ATTACH: &str =
    "INSERT INTO attachments (photo, name, thumbnail, token) VALUES ($1::text::uuid, $2, $3, $4) RETURNING id";
const EDIT: &str =
    "UPDATE photos SET caption = $2, exif = coalesce(exif, '{}') || $3, tags = array_append(tags[1:4], 'edited'), token = $4
    WHERE id = $1::text::uuid";
const COMMENT: &str =
    "INSERT INTO comments (photo, author, body, token) VALUES ($1::text::uuid, $2, $3, $4) RETURNING id";
const LIKE: &str = "INSERT INTO likes AS l (liker, photo, reaction, token) VALUES ($1, $2::text::uuid, $3, $4)
    ON CONFLICT (liker, photo) DO UPDATE SET reaction = excluded.reaction, at = now(), token = excluded.token";
const READ: &str = "SELECT p.token, u.name, (SELECT count(*) FROM comments c WHERE c.photo = p.id)
    FROM photos p JOIN users u ON u.id = p.owner WHERE p.id = $1::text::uuid";
const LOG: &str = "INSERT INTO history (actor, action, detail, token) VALUES ($1, $2, $3, $4)";

/// Photos of its own that a client keeps at most; with more it deletes the oldest.
const PHOTOS_MAX: usize = 150;
/// Photos that were there before on which one client comments and which it likes.
const SEEDED_PER_CLIENT: i64 = 200;

/// A client's `count`th token, counted from 1. Never 0, which the rows have that were there before.
fn numbered(client: i64, count: i64) -> i64 {
    ((client + 1) << 40) + count
}

impl Session {
    async fn open(server: &Config) -> Result<Session, Failure> {
        let failed = |error| Failure::Server { doing: "connecting", error };
        let connection = connect(server).await.map_err(failed)?;
        let (upload, attach, edit, comment, like, read, log) = tokio::try_join!(
            connection.prepare(UPLOAD),
            connection.prepare(ATTACH),
            connection.prepare(EDIT),
            connection.prepare(COMMENT),
            connection.prepare(LIKE),
            connection.prepare(READ),
            connection.prepare(LOG),
        )
        .map_err(failed)?;
        let sql = "SELECT id::text FROM photos WHERE path LIKE '/album/%' AND token = 0 ORDER BY id LIMIT $1";
        let rows = connection.query(sql, &[&SEEDED_PER_CLIENT.min(SEEDED_PHOTOS)]).await.map_err(failed)?;
        let seeded: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        if seeded.is_empty() {
            return Err(Failure::Wrong("connecting: the photos that were there before are not there".to_owned()));
        }
        Ok(Session { connection, upload, attach, edit, comment, like, read, log, seeded })
    }

    async fn run(&self, sql: &str, doing: &'static str) -> Result<(), Failure> {
        self.connection.batch_execute(sql).await.map_err(|error| Failure::Server { doing, error })
    }

    fn some_seeded(&self, rng: &mut StdRng) -> &str {
        &self.seeded[rng.random_range(0..self.seeded.len())]
    }
}

/// Runs a prepared statement that must reach exactly one row.
macro_rules! one_row {
    ($session:expr, $statement:ident, $doing:literal, $($value:expr),+) => {{
        let reached = $session.connection.execute(&$session.$statement, &[$(&$value),+]).await
            .map_err(|error| Failure::Server { doing: $doing, error })?;
        if reached != 1 {
            return Err(Failure::Wrong(format!(concat!($doing, ": {} rows where 1 was expected"), reached)));
        }
    }};
}

/// Runs a prepared INSERT that returns its key.
macro_rules! returning {
    ($session:expr, $statement:ident, $doing:literal, $($value:expr),+) => {
        $session.connection.query_one(&$session.$statement, &[$(&$value),+]).await
            .map_err(|error| Failure::Server { doing: $doing, error })?.get(0)
    };
}

impl Client {
    /// A client that connects with its first operation. `number` counts from 0 and stays below `OWNED_USERS`.
    pub fn new(number: usize, server: &Config) -> Client {
        Client {
            number: number as i64,
            server: server.clone(),
            session: None,
            tokens: 0,
            photos: Vec::new(),
            acknowledged: Acknowledged::default(),
        }
    }

    /// Opens the connection, where it is not open.
    ///
    /// # Errors
    /// When the server refuses it, or lacks what was there before.
    pub async fn connect(&mut self) -> Result<(), Failure> {
        if self.session.is_none() {
            self.session = Some(Session::open(&self.server).await?);
        }
        Ok(())
    }

    /// Closes the connection; the next operation opens another.
    pub fn disconnect(&mut self) {
        self.session = None;
    }

    /// One operation of the application, chosen at random.
    ///
    /// # Errors
    /// When the server refuses it, or answers what cannot be right. What it wrote is then in doubt.
    pub async fn operate(&mut self, rng: &mut StdRng) -> Result<(), Failure> {
        let session = match self.session.take() {
            Some(session) => session,
            None => Session::open(&self.server).await?,
        };
        let mut written = Written::default();
        let tokens_before = self.tokens;
        let outcome = self.choose(&session, rng, &mut written).await;
        self.session = Some(session);
        match outcome {
            Ok(()) => self.acknowledged.commit(written),
            Err(_) => {
                // What it remembers of these photos may not be so.
                let doubted = |photo: &Photo| written.rows.iter().any(|((_, key), _)| *key == photo.id);
                self.photos.retain(|photo| !doubted(photo));
                let tokens = (tokens_before + 1..=self.tokens).map(|count| numbered(self.number, count));
                self.acknowledged.doubt(tokens, written);
            }
        }
        outcome
    }

    async fn choose(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        if self.photos.len() < 10 {
            return self.upload(session, rng, written).await;
        }
        if self.photos.len() > PHOTOS_MAX {
            return self.delete(session, written).await;
        }
        match rng.random_range(0..100) {
            0..14 => self.upload(session, rng, written).await,
            14..24 => self.album(session, rng, written).await,
            24..36 => self.edit(session, rng, written).await,
            36..46 => self.comment(session, rng, written).await,
            46..56 => self.like(session, rng, written).await,
            56..60 => self.unlike(session, rng, written).await,
            60..66 => self.second_thoughts(session, rng, written).await,
            66..69 => self.never_mind(session, written).await,
            69..74 => self.visit(session, rng, written).await,
            74..79 => self.delete(session, written).await,
            79..83 => self.several_statements(session, written).await,
            83..88 => self.feed(session, rng).await,
            _ => self.read(session, rng).await,
        }
    }

    /// The user whose row this client owns.
    fn user(&self) -> i64 {
        self.number % OWNED_USERS + 1
    }

    /// A token that nothing else in this run has.
    fn token(&mut self) -> i64 {
        self.tokens += 1;
        numbered(self.number, self.tokens)
    }

    async fn insert_photo(&self, session: &Session, rng: &mut StdRng, token: i64) -> Result<String, Failure> {
        let audience = ["private", "friends", "everyone"][rng.random_range(0..3)];
        let caption = rng.random_bool(0.7).then(|| format!("näher, 'quoted' \\ back\tslash {token}"));
        let exif = json!({"iso": rng.random_range(1..64) * 100, "at": [rng.random::<f32>(), null]});
        let (path, tag) = (format!("/upload/{token}"), format!("tag {}", token % 13));
        Ok(returning!(session, upload, "uploading a photo", self.user(), path, caption, audience, tag, exif, token))
    }

    /// One autocommit INSERT with a default uuid that comes back.
    async fn upload(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        let token = self.token();
        let id = self.insert_photo(session, rng, token).await?;
        written.rows.push(((Table::Photos, id.clone()), Some(token)));
        self.photos.push(Photo { id, token, attachments: Vec::new(), comments: Vec::new() });
        Ok(())
    }

    /// A transaction over four tables.
    async fn album(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        session.run("BEGIN", "beginning an album").await?;
        let token = self.token();
        let id = self.insert_photo(session, rng, token).await?;
        written.rows.push(((Table::Photos, id.clone()), Some(token)));
        let mut photo = Photo { id: id.clone(), token, attachments: Vec::new(), comments: Vec::new() };
        for size in 1..=rng.random_range(1..4) {
            let token = self.token();
            let thumbnail: Vec<u8> = (0..size * 100).map(|_| rng.random()).collect();
            let attachment: i64 =
                returning!(session, attach, "attaching a thumbnail", id, format!("{size}00 px"), thumbnail, token);
            written.rows.push(((Table::Attachments, attachment.to_string()), Some(token)));
            photo.attachments.push(attachment);
        }
        let token = self.token();
        let comment: i64 = returning!(session, comment, "commenting", id, self.user(), "mine", token);
        written.rows.push(((Table::Comments, comment.to_string()), Some(token)));
        photo.comments.push(comment);
        self.log(session, "album", written).await?;
        session.run("COMMIT", "committing an album").await?;
        self.photos.push(photo);
        Ok(())
    }

    async fn log(&mut self, session: &Session, action: &str, written: &mut Written) -> Result<(), Failure> {
        let token = self.token();
        written.history.push(token);
        one_row!(session, log, "writing history", self.user(), action, json!({"client": self.number}), token);
        Ok(())
    }

    /// One autocommit UPDATE by key.
    async fn edit(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        let token = self.token();
        let photo = rng.random_range(0..self.photos.len());
        let photo = &mut self.photos[photo];
        written.rows.push(((Table::Photos, photo.id.clone()), Some(token)));
        photo.token = token;
        one_row!(
            session,
            edit,
            "editing a photo",
            photo.id,
            format!("caption {token}"),
            json!({"edited": token}),
            token
        );
        Ok(())
    }

    /// A comment on a photo that all clients comment on: its row is locked by many at once.
    async fn comment(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        let token = self.token();
        let body = "à propos ".repeat(rng.random_range(1..30));
        let id: i64 = returning!(session, comment, "commenting", session.some_seeded(rng), self.user(), body, token);
        written.rows.push(((Table::Comments, id.to_string()), Some(token)));
        Ok(())
    }

    /// An upsert, and a counter that all clients write, in one transaction.
    async fn like(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        let token = self.token();
        let photo = session.some_seeded(rng).to_owned();
        let reaction = ["heart", "star", "🦀"][rng.random_range(0..3)];
        written.rows.push(((Table::Likes, format!("{}:{photo}", self.user())), Some(token)));
        written.likes += 1;
        session.run("BEGIN", "beginning a like").await?;
        one_row!(session, like, "liking a photo", self.user(), photo, reaction, token);
        let count = format!("UPDATE photos SET likes = likes + 1 WHERE id = '{photo}'");
        session.run(&count, "counting a like").await?;
        session.run("COMMIT", "committing a like").await
    }

    /// A DELETE of a row that may or may not be there, by a key of two columns.
    async fn unlike(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        let photo = session.some_seeded(rng).to_owned();
        written.rows.push(((Table::Likes, format!("{}:{photo}", self.user())), None));
        let sql = format!("DELETE FROM likes WHERE liker = {} AND photo = '{photo}'", self.user());
        session.run(&sql, "taking a like back").await
    }

    /// A savepoint that is rolled back inside a transaction that commits.
    async fn second_thoughts(
        &mut self,
        session: &Session,
        rng: &mut StdRng,
        written: &mut Written,
    ) -> Result<(), Failure> {
        session.run("BEGIN", "beginning").await?;
        let kept = self.token();
        let id = self.insert_photo(session, rng, kept).await?;
        written.rows.push(((Table::Photos, id.clone()), Some(kept)));
        session.run("SAVEPOINT thought", "setting a savepoint").await?;
        let (regretted, logged) = (self.token(), self.token());
        written.undone.extend([regretted, logged]);
        let _: i64 = returning!(session, comment, "commenting", id, self.user(), "regretted", regretted);
        one_row!(session, edit, "editing a photo", id, "regretted", json!({}), regretted);
        one_row!(session, log, "writing history", self.user(), "regretted", json!({}), logged);
        session.run("ROLLBACK TO SAVEPOINT thought", "rolling back to a savepoint").await?;
        let token = self.token();
        let comment: i64 = returning!(session, comment, "commenting", id, self.user(), "on second thoughts", token);
        written.rows.push(((Table::Comments, comment.to_string()), Some(token)));
        session.run("RELEASE SAVEPOINT thought; COMMIT", "committing").await?;
        self.photos.push(Photo { id, token: kept, attachments: Vec::new(), comments: vec![comment] });
        Ok(())
    }

    /// A transaction that is rolled back.
    async fn never_mind(&mut self, session: &Session, written: &mut Written) -> Result<(), Failure> {
        let token = self.token();
        written.undone.push(token);
        let Some(photo) = self.photos.first() else { return Ok(()) };
        session.run("BEGIN", "beginning").await?;
        one_row!(session, edit, "editing a photo", photo.id, "never mind", json!({"never": "mind"}), token);
        one_row!(session, log, "writing history", self.user(), "never mind", json!({}), token);
        session.run("ROLLBACK", "rolling back").await
    }

    /// A counter in rows that all clients write.
    async fn visit(&mut self, session: &Session, rng: &mut StdRng, written: &mut Written) -> Result<(), Failure> {
        written.visits += 1;
        let user = rng.random_range(OWNED_USERS + 1..=ALL_USERS.min(OWNED_USERS + 20));
        session.run(&format!("UPDATE users SET visits = visits + 1 WHERE id = {user}"), "counting a visit").await
    }

    /// A photo with all that hangs on it: the oldest of this client.
    async fn delete(&mut self, session: &Session, written: &mut Written) -> Result<(), Failure> {
        let photo = self.photos.remove(0);
        for attachment in &photo.attachments {
            written.rows.push(((Table::Attachments, attachment.to_string()), None));
        }
        for comment in &photo.comments {
            written.rows.push(((Table::Comments, comment.to_string()), None));
        }
        written.rows.push(((Table::Photos, photo.id.clone()), None));
        session.run("BEGIN ISOLATION LEVEL READ COMMITTED", "beginning to delete").await?;
        let id = &photo.id;
        session.run(&format!("DELETE FROM attachments WHERE photo = '{id}'"), "deleting attachments").await?;
        session
            .run(
                &format!("DELETE FROM comments AS c USING photos p WHERE p.id = '{id}' AND c.photo = p.id"),
                "deleting comments",
            )
            .await?;
        session.run(&format!("DELETE FROM photos WHERE id = '{id}'"), "deleting a photo").await?;
        self.log(session, "delete", written).await?;
        session.run("COMMIT", "committing a delete").await
    }

    /// Several statements in one Query message: one transaction, without BEGIN.
    async fn several_statements(&mut self, session: &Session, written: &mut Written) -> Result<(), Failure> {
        let (profile, logged) = (self.token(), self.token());
        let user = self.user();
        written.rows.push(((Table::Users, user.to_string()), Some(profile)));
        written.history.push(logged);
        let sql = format!(
            "UPDATE users SET settings = settings || '{{\"seen\": {profile}}}', token = {profile} WHERE id = {user};
             INSERT INTO history (actor, action, detail, token) VALUES ({user}, 'profile', '{{}}', {logged})"
        );
        session.run(&sql, "changing a profile").await
    }

    /// A photo of its own must be as this client left it.
    async fn read(&mut self, session: &Session, rng: &mut StdRng) -> Result<(), Failure> {
        let photo = &self.photos[rng.random_range(0..self.photos.len())];
        let doing = "reading a photo";
        let rows = session.connection.query(&session.read, &[&photo.id]).await;
        let rows = rows.map_err(|error| Failure::Server { doing, error })?;
        let token = rows.first().map(|row| row.get::<_, i64>(0));
        if token != Some(photo.token) {
            return Err(Failure::Wrong(format!("{doing}: token {token:?} where {} was acknowledged", photo.token)));
        }
        Ok(())
    }

    /// Many rows, ordered.
    async fn feed(&mut self, session: &Session, rng: &mut StdRng) -> Result<(), Failure> {
        let doing = "reading the feed";
        let sql = "SELECT id::text, caption, tags, audience::text, exif, taken::text FROM photos WHERE owner = $1 ORDER BY taken DESC LIMIT 20";
        let owner = rng.random_range(1..=ALL_USERS);
        let rows = session.connection.query(sql, &[&owner]).await.map_err(|error| Failure::Server { doing, error })?;
        if rows.is_empty() {
            return Err(Failure::Wrong(format!("{doing}: user {owner} has no photo, and had some before")));
        }
        Ok(())
    }
}
