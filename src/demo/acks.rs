//! What clients were told: every acknowledged write by its token, and the look-up of all of them in the end.

use std::collections::{HashMap, HashSet};

use futures_util::TryStreamExt;
use tokio_postgres::Client;

use super::schema::Table;

/// Names one row: its table, and its key as `Table::key` writes it.
pub type Row = (Table, String);

/// What one operation writes. Tokens are unique over the whole run.
#[derive(Debug, Default)]
pub struct Written {
    /// Rows with the token that each carries afterwards; None: deleted.
    pub rows: Vec<(Row, Option<i64>)>,
    /// Tokens added to the table without a key.
    pub history: Vec<i64>,
    /// Tokens written and rolled back: they must be nowhere.
    pub undone: Vec<i64>,
    /// How much it added to counters that all clients share: visits of users.
    pub visits: i64,
    /// As `visits`: likes of photos that were there before.
    pub likes: i64,
}

/// Everything that one client, or all of them, were told is committed.
#[derive(Debug, Default)]
pub struct Acknowledged {
    rows: HashMap<Row, Option<i64>>,
    history: HashSet<i64>,
    undone: HashSet<i64>,
    visits: i64,
    likes: i64,
    writes: u64,
    /// Writes whose outcome the client never learnt: may be there or not.
    doubtful: HashSet<i64>,
    doubtful_rows: HashSet<Row>,
    doubtful_visits: i64,
    doubtful_likes: i64,
}

impl Acknowledged {
    /// The server has said that these writes are committed.
    pub fn commit(&mut self, written: Written) {
        self.writes += (written.rows.len() + written.history.len()) as u64;
        self.writes += written.visits.unsigned_abs() + written.likes.unsigned_abs();
        self.rows.extend(written.rows);
        self.history.extend(written.history);
        self.undone.extend(written.undone);
        self.visits += written.visits;
        self.likes += written.likes;
    }

    /// The operation failed: nobody knows whether it is committed. `tokens`: all that it may have written.
    pub fn doubt(&mut self, tokens: impl Iterator<Item = i64>, written: Written) {
        self.doubtful_rows.extend(written.rows.into_iter().map(|(row, _)| row));
        self.doubtful.extend(tokens);
        self.undone.extend(written.undone);
        self.doubtful_visits += written.visits;
        self.doubtful_likes += written.likes;
    }

    /// Adds another client's. Clients own their rows, so that no row is in both.
    pub fn merge(&mut self, other: Acknowledged) {
        self.rows.extend(other.rows);
        self.history.extend(other.history);
        self.undone.extend(other.undone);
        self.visits += other.visits;
        self.likes += other.likes;
        self.writes += other.writes;
        self.doubtful.extend(other.doubtful);
        self.doubtful_rows.extend(other.doubtful_rows);
        self.doubtful_visits += other.doubtful_visits;
        self.doubtful_likes += other.doubtful_likes;
    }

    /// How many writes of single rows were acknowledged.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Looks every acknowledged write up on one server, over a connection of its own.
    ///
    /// # Errors
    /// When the server cannot be read.
    pub async fn look_up(&self, server: &Client) -> Result<LookUp, tokio_postgres::Error> {
        let mut found = LookUp { acknowledged: self.writes, ..LookUp::default() };
        for table in Table::ALL {
            let sql = format!("SELECT {}, token FROM {}", table.key(), table.name());
            let mut present = HashMap::new();
            for row in server.query(&sql, &[]).await? {
                present.insert(row.get::<_, String>(0), row.get::<_, i64>(1));
            }
            self.look_up_table(table, &present, &mut found);
        }
        self.look_up_history(server, &mut found).await?;
        let visits = sum(server, "SELECT sum(visits)::bigint FROM users").await?;
        found.count("users.visits", self.visits, self.doubtful_visits, visits);
        let likes = sum(server, "SELECT sum(likes)::bigint FROM photos").await?;
        found.count("photos.likes", self.likes, self.doubtful_likes, likes);
        Ok(found)
    }

    fn look_up_table(&self, table: Table, present: &HashMap<String, i64>, found: &mut LookUp) {
        for (row, token) in self.rows.iter().filter(|((of, _), _)| *of == table) {
            if self.doubtful_rows.contains(row) {
                continue;
            }
            match (token, present.get(&row.1)) {
                (Some(expected), Some(actual)) if expected == actual => {}
                (None, None) => {}
                (Some(expected), Some(actual)) => {
                    found.miss(format!("{} {}: token {actual} where {expected} was acknowledged", table.name(), row.1));
                }
                (Some(expected), None) => found.miss(format!("{} {}: no row (token {expected})", table.name(), row.1)),
                (None, Some(actual)) => {
                    found.miss(format!("{} {}: deleted, yet there with {actual}", table.name(), row.1))
                }
            }
        }
        for (key, token) in present.iter().filter(|(_, token)| self.undone.contains(token)) {
            found.surprise(format!("{} {key}: token {token} was rolled back", table.name()));
        }
        // A token above 0 was written by a client; one that no client knows of has come from nowhere.
        for (key, token) in present.iter().filter(|(_, token)| **token > 0 && !self.undone.contains(token)) {
            let row = (table, key.clone());
            if !self.rows.contains_key(&row) && !self.doubtful_rows.contains(&row) && !self.doubtful.contains(token) {
                found.surprise(format!("{} {key}: token {token} was never acknowledged", table.name()));
            }
        }
    }

    async fn look_up_history(&self, server: &Client, found: &mut LookUp) -> Result<(), tokio_postgres::Error> {
        let mut present: HashMap<i64, u64> = HashMap::new();
        let rows = server.query_raw("SELECT token FROM history WHERE token > 0", [0i64; 0]).await?;
        tokio::pin!(rows);
        while let Some(row) = rows.try_next().await? {
            *present.entry(row.get(0)).or_default() += 1;
        }
        for token in self.history.iter().filter(|token| !present.contains_key(token)) {
            found.miss(format!("history: no row with token {token}"));
        }
        for (token, times) in present {
            if times > 1 {
                found.surprise(format!("history: token {token} is there {times} times"));
            } else if !self.history.contains(&token) && !self.doubtful.contains(&token) {
                found.surprise(format!("history: token {token} was rolled back or never acknowledged"));
            }
        }
        Ok(())
    }
}

async fn sum(server: &Client, sql: &str) -> Result<i64, tokio_postgres::Error> {
    Ok(server.query_one(sql, &[]).await?.get::<_, Option<i64>>(0).unwrap_or(0))
}

/// What the look-up found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookUp {
    /// Writes that were acknowledged, and looked up.
    pub acknowledged: u64,
    /// Of these, how many are not there.
    pub missing: u64,
    /// Writes that are there though they were rolled back, or twice, or nobody made them.
    pub unexpected: u64,
    /// The first of both, for people.
    pub examples: Vec<String>,
}

impl LookUp {
    const EXAMPLES: usize = 10;

    /// Counts an acknowledged write that is not there.
    pub fn miss(&mut self, what: String) {
        self.missing += 1;
        self.example(what);
    }

    /// Counts a write that should not be there.
    pub fn surprise(&mut self, what: String) {
        self.unexpected += 1;
        self.example(what);
    }

    /// A counter that must have grown by `acknowledged`, and at most by `doubtful` more.
    pub fn count(&mut self, name: &str, acknowledged: i64, doubtful: i64, actual: i64) {
        if actual < acknowledged {
            self.missing += acknowledged.abs_diff(actual);
            self.example(format!("{name}: {actual} where {acknowledged} were acknowledged"));
        } else if actual > acknowledged + doubtful {
            self.unexpected += actual.abs_diff(acknowledged + doubtful);
            self.example(format!("{name}: {actual} where only {acknowledged} were acknowledged"));
        }
    }

    fn example(&mut self, what: String) {
        if self.examples.len() < Self::EXAMPLES {
            self.examples.push(what);
        }
    }
}
