//! One session with a server or proxy: prepared statements by name, binary values, one flight after the other.

use bytes::{BufMut, Bytes, BytesMut};
use crossfade::wire::conn::Conn;
use crossfade::wire::frame::{self, Fields};
use tokio::net::TcpStream;

use crate::Outcome;

/// A row's values as they came, in binary.
pub type Row = Vec<Option<Bytes>>;

/// One session.
pub struct Connection {
    conn: Conn<TcpStream>,
}

/// What came up to one ReadyForQuery.
#[derive(Default)]
pub struct Answer {
    /// All rows of the flight.
    pub rows: Vec<Row>,
    /// The last command tag, with its NUL.
    pub tag: Bytes,
}

impl Connection {
    /// Logs in as postgres, without a password. `options` as in libpq.
    pub async fn open(address: &str, database: &str, options: &str) -> Outcome<Connection> {
        let stream = TcpStream::connect(address).await.map_err(|error| format!("{address}: {error}"))?;
        stream.set_nodelay(true)?;
        let mut conn = Conn::new(stream, BytesMut::new());
        let mut packet = BytesMut::new();
        packet.put_u32(196_608);
        for word in ["user", "postgres", "database", database, "client_encoding", "UTF8", "options", options] {
            packet.put_slice(word.as_bytes());
            packet.put_u8(0);
        }
        packet.put_u8(0);
        conn.out.put_u32(packet.len() as u32 + 4);
        conn.out.put_slice(&packet);
        let mut connection = Connection { conn };
        connection.answer().await?;
        Ok(connection)
    }

    /// Prepares statements: name, text, types of the parameters.
    pub async fn prepare(&mut self, statements: &[(&str, &str, &[u32])]) -> Outcome<()> {
        for (name, text, types) in statements {
            frame::parse(&mut self.conn.out, name.as_bytes(), text.as_bytes(), types);
        }
        self.sync().await?;
        self.answer().await?;
        Ok(())
    }

    /// One execution of a prepared statement, into the flight.
    pub fn put(&mut self, name: &str, values: &[Option<&[u8]>]) {
        frame::bind(&mut self.conn.out, b"", name.as_bytes(), &[1], values.iter().copied(), 1);
        frame::execute(&mut self.conn.out, b"");
    }

    /// Sync, and off it goes. Its answer is read later.
    pub async fn sync(&mut self) -> Outcome<()> {
        frame::sync(&mut self.conn.out);
        Ok(self.conn.flush().await?)
    }

    /// Sync, and its answer.
    pub async fn run(&mut self) -> Outcome<Answer> {
        frame::sync(&mut self.conn.out);
        self.answer().await
    }

    /// Reads up to ReadyForQuery. An error of the server is one here.
    pub async fn answer(&mut self) -> Outcome<Answer> {
        let mut answer = Answer::default();
        loop {
            let (tag, payload) = self.conn.frame().await?;
            match tag {
                b'D' => answer.rows.push(row(&payload)?),
                b'C' => answer.tag = payload,
                b'E' => {
                    let error = frame::server_error(&payload);
                    return Err(format!("{} ({})", error.message, error.code).into());
                }
                b'R' if payload[..] != [0; 4] => return Err("the server wants a password".into()),
                b'Z' => return Ok(answer),
                _ => {}
            }
        }
    }
}

fn row(payload: &Bytes) -> Outcome<Row> {
    let mut fields = Fields::new(payload);
    (0..fields.count()?).map(|_| Ok(fields.value()?.map(|value| payload.slice_ref(value)))).collect()
}
