//! Frames of the PostgreSQL protocol (version 3): a tag byte, a length that counts itself, a payload.
//! Pure functions over buffers. Nothing here looks further into a payload than asked, and nothing makes a String of client bytes.
//!
//! Source: PostgreSQL documentation, "Message Formats".

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Tag and length of a frame's head.
pub const HEAD: usize = 5;

/// The longest message of a client that carries no data (PQ_SMALL_MESSAGE_LIMIT).
pub const SMALL: usize = 10_000;

/// PostgreSQL refuses longer messages (PQ_LARGE_MESSAGE_LIMIT).
pub const LONGEST: usize = 0x3fff_ffff;

/// The head of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What kind of message it is.
    pub tag: u8,
    /// Bytes of the whole frame, head included.
    pub total: usize,
}

/// Bytes that are no frame of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The length says less than itself or more than PostgreSQL allows.
    #[error("invalid message length")]
    Length,
    /// A payload that is shorter than its own fields.
    #[error("insufficient data left in message")]
    Short,
    /// A string without its NUL.
    #[error("invalid string in message")]
    Unterminated,
    /// A payload that is longer than its fields.
    #[error("invalid message format")]
    Long,
}

/// The head of the frame that begins the buffer; None while fewer than five bytes are there.
pub fn head(buf: &[u8]) -> Result<Option<Head>, Malformed> {
    let Some(start) = buf.first_chunk::<HEAD>() else { return Ok(None) };
    let length = u32::from_be_bytes([start[1], start[2], start[3], start[4]]) as usize;
    if !(4..=LONGEST).contains(&length) {
        return Err(Malformed::Length);
    }
    Ok(Some(Head { tag: start[0], total: length + 1 }))
}

impl Head {
    /// Whether a client's message may be so long, as PostgreSQL has it: what carries no statement and no data is short.
    pub fn fits_client(self) -> bool {
        self.total <= SMALL || matches!(self.tag, b'Q' | b'P' | b'B' | b'F' | b'd' | b'p')
    }

    /// Whether a server's message may be so long, as libpq has it (VALID_LONG_MESSAGE_TYPE), and ParameterDescription.
    pub fn fits_server(self) -> bool {
        self.total <= 30_000 || matches!(self.tag, b'T' | b'D' | b'd' | b'V' | b'E' | b'N' | b'A' | b't')
    }
}

/// Whether a whole message of a client is laid out as PostgreSQL reads it (pq_getmsg*, pq_getmsgend). What is not is refused there, and must not be
/// read here in any other way.
pub fn check(tag: u8, payload: &[u8]) -> Result<(), Malformed> {
    let mut fields = Fields::new(payload);
    match tag {
        b'Q' => drop(fields.string()?),
        b'P' => {
            fields.string()?;
            fields.string()?;
            let types = fields.count()?;
            fields.take(types * 4)?;
        }
        b'B' => {
            fields.string()?;
            fields.string()?;
            fields.skip_values()?;
            let formats = fields.count()?;
            fields.take(formats * 2)?;
        }
        b'E' => {
            fields.string()?;
            fields.int32()?;
        }
        b'D' | b'C' => {
            fields.byte()?;
            fields.string()?;
        }
        b'S' => {}
        _ => return Ok(()),
    }
    if fields.rest().is_empty() { Ok(()) } else { Err(Malformed::Long) }
}

/// Reads the fields of one payload, never beyond its end.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Over one payload (without the head).
    pub fn new(payload: &'a [u8]) -> Fields<'a> {
        Fields { rest: payload }
    }

    /// What has not been read.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The bytes up to the next NUL, which is passed over.
    pub fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let at = memchr::memchr(0, self.rest).ok_or(Malformed::Unterminated)?;
        let (string, rest) = self.rest.split_at(at);
        self.rest = &rest[1..];
        Ok(string)
    }

    /// One byte.
    pub fn byte(&mut self) -> Result<u8, Malformed> {
        let (&byte, rest) = self.rest.split_first().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(byte)
    }

    /// A 16-bit number.
    pub fn int16(&mut self) -> Result<i16, Malformed> {
        Ok(self.take(2)?.get_i16())
    }

    /// A number of fields: 16 bits without a sign.
    pub fn count(&mut self) -> Result<usize, Malformed> {
        Ok(usize::from(self.take(2)?.get_u16()))
    }

    /// Parameters of a Bind: their formats and their values.
    pub fn skip_values(&mut self) -> Result<(), Malformed> {
        let formats = self.count()?;
        self.take(formats * 2)?;
        for _ in 0..self.count()? {
            self.value()?;
        }
        Ok(())
    }

    /// A 32-bit number.
    pub fn int32(&mut self) -> Result<i32, Malformed> {
        Ok(self.take(4)?.get_i32())
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        if self.rest.len() < count {
            return Err(Malformed::Short);
        }
        let (taken, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(taken)
    }

    /// A value with its length before it; None for -1.
    pub fn value(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        match self.int32()? {
            -1 => Ok(None),
            length => Ok(Some(self.take(usize::try_from(length).map_err(|_| Malformed::Short)?)?)),
        }
    }
}

/// Appends one frame whose payload `body` writes; the length is filled in behind it.
pub fn put(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_u32(0);
    body(out);
    let length = (out.len() - at) as u32;
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

fn put_string(out: &mut BytesMut, string: &[u8]) {
    out.put_slice(string);
    out.put_u8(0);
}

/// Query.
pub fn query(out: &mut BytesMut, text: &[u8]) {
    put(out, b'Q', |out| put_string(out, text));
}

/// Parse; `types` are OIDs.
pub fn parse(out: &mut BytesMut, name: &[u8], text: &[u8], types: &[u32]) {
    put(out, b'P', |out| {
        put_string(out, name);
        put_string(out, text);
        out.put_u16(types.len() as u16);
        for &oid in types {
            out.put_u32(oid);
        }
    });
}

/// Bind; `formats` one per parameter (or one for all), `result` one format for all columns.
pub fn bind<'v>(
    out: &mut BytesMut,
    portal: &[u8],
    statement: &[u8],
    formats: &[i16],
    values: impl ExactSizeIterator<Item = Option<&'v [u8]>>,
    result: i16,
) {
    put(out, b'B', |out| {
        put_string(out, portal);
        put_string(out, statement);
        out.put_u16(formats.len() as u16);
        for &format in formats {
            out.put_i16(format);
        }
        out.put_u16(values.len() as u16);
        for value in values {
            match value {
                None => out.put_i32(-1),
                Some(bytes) => {
                    out.put_i32(bytes.len() as i32);
                    out.put_slice(bytes);
                }
            }
        }
        out.put_u16(1);
        out.put_i16(result);
    });
}

/// Execute, without a row limit.
pub fn execute(out: &mut BytesMut, portal: &[u8]) {
    execute_rows(out, portal, 0);
}

/// Execute of at most so many rows; 0: all.
pub fn execute_rows(out: &mut BytesMut, portal: &[u8], rows: u32) {
    put(out, b'E', |out| {
        put_string(out, portal);
        out.put_u32(rows);
    });
}

/// Close of a statement.
pub fn close_statement(out: &mut BytesMut, name: &[u8]) {
    put(out, b'C', |out| {
        out.put_u8(b'S');
        put_string(out, name);
    });
}

/// Close of a portal.
pub fn close_portal(out: &mut BytesMut, name: &[u8]) {
    put(out, b'C', |out| {
        out.put_u8(b'P');
        put_string(out, name);
    });
}

/// Sync.
pub fn sync(out: &mut BytesMut) {
    out.put_slice(b"S\0\0\0\x04");
}

/// Flush.
pub fn flush(out: &mut BytesMut) {
    out.put_slice(b"H\0\0\0\x04");
}

/// Terminate.
pub fn terminate(out: &mut BytesMut) {
    out.put_slice(b"X\0\0\0\x04");
}

/// ReadyForQuery.
pub fn ready(out: &mut BytesMut, status: u8) {
    out.put_slice(&[b'Z', 0, 0, 0, 5, status]);
}

/// CommandComplete.
pub fn complete(out: &mut BytesMut, tag: &[u8]) {
    put(out, b'C', |out| put_string(out, tag));
}

/// NoData.
pub fn no_data(out: &mut BytesMut) {
    out.put_slice(b"n\0\0\0\x04");
}

/// ParameterStatus.
pub fn parameter_status(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put(out, b'S', |out| {
        put_string(out, name);
        put_string(out, value);
    });
}

/// An error or notice of ours for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// ERROR, FATAL, WARNING, ...
    pub severity: &'static str,
    /// SQLSTATE.
    pub code: &'static str,
    /// What happened, and where.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
}

impl Report {
    /// An error that ends the statement.
    pub fn error(code: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Report {
        Report { severity: "ERROR", code, message: message.into(), hint: Some(hint.into()) }
    }

    /// An error that ends the connection.
    pub fn fatal(code: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Report {
        Report { severity: "FATAL", code, message: message.into(), hint: Some(hint.into()) }
    }

    /// Appends it as an ErrorResponse.
    pub fn put(&self, out: &mut BytesMut) {
        put(out, b'E', |out| {
            for (field, value) in
                [(b'S', self.severity), (b'V', self.severity), (b'C', self.code), (b'M', self.message.as_str())]
            {
                out.put_u8(field);
                put_string(out, value.replace('\0', " ").as_bytes());
            }
            if let Some(hint) = &self.hint {
                out.put_u8(b'H');
                put_string(out, hint.as_bytes());
            }
            out.put_u8(0);
        });
    }
}

/// What an ErrorResponse or NoticeResponse of a server says: SQLSTATE and message, for our logs and decisions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// SQLSTATE.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// FATAL or PANIC: the server closes the connection.
    pub fatal: bool,
}

/// Reads an ErrorResponse's payload.
pub fn server_error(payload: &[u8]) -> ServerError {
    let mut fields = Fields::new(payload);
    let mut error = ServerError::default();
    while let Ok(kind) = fields.byte() {
        if kind == 0 {
            break;
        }
        let Ok(value) = fields.string() else { break };
        match kind {
            b'C' => error.code = String::from_utf8_lossy(value).into_owned(),
            b'M' => error.message = String::from_utf8_lossy(value).into_owned(),
            b'V' => error.fatal = value == b"FATAL" || value == b"PANIC",
            _ => {}
        }
    }
    error
}

/// A field of an ErrorResponse or NoticeResponse.
pub fn field(payload: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut fields = Fields::new(payload);
    loop {
        let kind = fields.byte().ok().filter(|&kind| kind != 0)?;
        let value = fields.string().ok()?;
        if kind == wanted {
            return Some(value);
        }
    }
}

/// An ErrorResponse's payload with another position, where it has one.
pub fn with_position(payload: &[u8], change: impl Fn(usize) -> usize) -> Option<BytesMut> {
    let value = field(payload, b'P')?;
    let position = change(std::str::from_utf8(value).ok()?.parse().ok()?).to_string();
    let start = value.as_ptr().addr() - payload.as_ptr().addr();
    let mut out = BytesMut::from(&payload[..start]);
    out.extend_from_slice(position.as_bytes());
    out.extend_from_slice(&payload[start + value.len()..]);
    Some(out)
}

/// The payload of a RowDescription without its last column; None if it was the only one.
pub fn cut_description(payload: &[u8]) -> Result<Option<Bytes>, Malformed> {
    let mut fields = Fields::new(payload);
    let count = fields.int16()?;
    if count < 2 {
        return Ok(None);
    }
    for _ in 0..count - 1 {
        fields.string()?;
        fields.take(18)?;
    }
    let mut cut = BytesMut::from(&payload[..payload.len() - fields.rest().len()]);
    cut[..2].copy_from_slice(&(count - 1).to_be_bytes());
    Ok(Some(cut.freeze()))
}

/// A row before its last value: number of values in all, bytes of those before the last (without the count), the last one.
pub type Cut<'a> = (i16, &'a [u8], Option<&'a [u8]>);

/// A DataRow's payload, taken apart at its last value: number of values, bytes of all before the last one (without the count), the last one.
pub fn cut_row(payload: &[u8]) -> Result<Cut<'_>, Malformed> {
    let mut fields = Fields::new(payload);
    let count = fields.int16()?;
    if count < 1 {
        return Err(Malformed::Short);
    }
    let start = fields.rest();
    for _ in 0..count - 1 {
        fields.value()?;
    }
    let kept = &start[..start.len() - fields.rest().len()];
    Ok((count, kept, fields.value()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_row_is_cut_before_its_last_value() {
        let mut row = BytesMut::new();
        put(&mut row, b'D', |out| {
            out.put_i16(3);
            for value in [Some("a"), None, Some("image")] {
                match value {
                    Some(text) => {
                        out.put_i32(text.len() as i32);
                        out.put_slice(text.as_bytes());
                    }
                    None => out.put_i32(-1),
                }
            }
        });
        let (count, kept, last) = cut_row(&row[HEAD..]).unwrap();
        assert_eq!((count, kept, last), (3, &b"\0\0\0\x01a\xff\xff\xff\xff"[..], Some(&b"image"[..])));
    }

    proptest! {
        #[test]
        fn fuzz_frames_written_are_frames_read(
            name in prop::collection::vec(1_u8.., 0..20),
            text in prop::collection::vec(1_u8.., 0..60),
            types in prop::collection::vec(any::<u32>(), 0..5),
            values in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut out = BytesMut::new();
            query(&mut out, &text);
            parse(&mut out, &name, &text, &types);
            bind(&mut out, &name, &text, &[1], values.iter().map(Option::as_deref), 0);
            execute(&mut out, &name);
            close_portal(&mut out, &name);
            sync(&mut out);
            let mut tags = Vec::new();
            while let Some(head) = head(&out).unwrap() {
                let frame = out.split_to(head.total);
                tags.push(head.tag);
                prop_assert!(head.fits_client());
                prop_assert_eq!(check(head.tag, &frame[HEAD..]), Ok(()));
                // Cut short anywhere, or longer by one, it is none.
                let short = &frame[HEAD..HEAD + cut.index(frame.len() - HEAD + 1)];
                prop_assert_eq!(check(head.tag, short).is_ok(), short.len() == frame.len() - HEAD);
                prop_assert!(check(head.tag, &[&frame[HEAD..], b"x"].concat()).is_err());
            }
            prop_assert_eq!(&tags[..], b"QPBECS");
        }

        #[test]
        fn fuzz_garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = head(&bytes);
            for tag in *b"QPBEDCSFHdcfpX" {
                let _ = check(tag, &bytes);
            }
            let _ = cut_row(&bytes);
            let _ = cut_description(&bytes);
            let _ = server_error(&bytes);
        }
    }
}
