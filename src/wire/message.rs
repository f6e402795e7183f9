//! The few messages of a login: one type byte, a length that counts itself, a body. Nothing here is on the data path.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The type byte.
    pub tag: u8,
    /// What follows the length.
    pub body: Bytes,
}

impl Message {
    /// The message as it stood on the wire.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(5 + self.body.len());
        put_message(&mut out, self.tag, &self.body);
        out.freeze()
    }
}

/// Takes a whole message off the front of `buf`; None if more bytes are needed. An error is a length that no message
/// can have, or one above `max` bytes of body.
pub fn take_message(buf: &mut BytesMut, max: usize) -> io::Result<Option<Message>> {
    let Some(header) = buf.get(..5) else { return Ok(None) };
    let tag = header[0];
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length < 4 || length - 4 > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of the login has an impossible length"));
    }
    if buf.len() < 1 + length {
        return Ok(None);
    }
    buf.advance(5);
    Ok(Some(Message { tag, body: buf.split_to(length - 4).freeze() }))
}

/// Reads one message; bytes behind it stay in `buf`. None: the peer closed the connection between two messages.
pub async fn read_message(
    stream: &mut (impl AsyncRead + Unpin),
    buf: &mut BytesMut,
    max: usize,
) -> io::Result<Option<Message>> {
    loop {
        if let Some(message) = take_message(buf, max)? {
            return Ok(Some(message));
        }
        if stream.read_buf(buf).await? == 0 {
            return match buf.is_empty() {
                true => Ok(None),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
    }
}

/// Appends a message. Bodies of a login are short: one of 2 GiB is a bug.
pub fn put_message(out: &mut BytesMut, tag: u8, body: &[u8]) {
    out.put_u8(tag);
    out.put_u32(u32::try_from(body.len() + 4).expect("a login's message is short"));
    out.put_slice(body);
}

/// An ErrorResponse of ours, severity FATAL, as PostgreSQL sends it when a login fails.
pub fn fatal(code: &str, message: &str, detail: Option<&str>, hint: Option<&str>) -> Bytes {
    let mut body = BytesMut::new();
    let fields = [
        (b'S', Some("FATAL")),
        (b'V', Some("FATAL")),
        (b'C', Some(code)),
        (b'M', Some(message)),
        (b'D', detail),
        (b'H', hint),
    ];
    for (field, text) in fields {
        if let Some(text) = text {
            body.put_u8(field);
            body.extend(text.bytes().filter(|byte| *byte != 0));
            body.put_u8(0);
        }
    }
    body.put_u8(0);
    let mut out = BytesMut::with_capacity(body.len() + 5);
    put_message(&mut out, b'E', &body);
    out.freeze()
}

/// A field of an ErrorResponse's or NoticeResponse's body: `C` the SQLSTATE, `M` the message, ...
pub fn error_field(body: &[u8], field: u8) -> Option<&[u8]> {
    let mut rest = body;
    while let Some((&code, after)) = rest.split_first() {
        let end = memchr::memchr(0, after)?;
        if code == field {
            return Some(&after[..end]);
        }
        rest = &after[end + 1..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn errors_of_ours_are_read_back() {
        let mut buf = BytesMut::from(&fatal("28P01", "no\0pe", None, Some("try again"))[..]);
        buf.extend_from_slice(b"Z");
        let message = take_message(&mut buf, 1000).unwrap().unwrap();
        assert_eq!((message.tag, &buf[..]), (b'E', &b"Z"[..]));
        assert_eq!(error_field(&message.body, b'C'), Some(&b"28P01"[..]));
        assert_eq!(error_field(&message.body, b'M'), Some(&b"nope"[..]));
        assert_eq!(error_field(&message.body, b'H'), Some(&b"try again"[..]));
        assert_eq!(error_field(&message.body, b'D'), None);
        assert_eq!(message.encode(), fatal("28P01", "nope", None, Some("try again")));
    }

    #[test]
    fn lengths_are_bounded() {
        for header in [&b"p\0\0\0\x03"[..], b"p\0\0\x10\0", b"p\xff\xff\xff\xff"] {
            assert!(take_message(&mut BytesMut::from(header), 100).is_err(), "{header:?}");
        }
        assert_eq!(take_message(&mut BytesMut::from(&b"p\0\0\0\x05"[..]), 100).unwrap(), None);
    }

    proptest! {
        #[test]
        fn fuzz_any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut buf = BytesMut::from(&bytes[..]);
            while let Ok(Some(message)) = take_message(&mut buf, 50) {
                prop_assert!(message.body.len() <= 50);
            }
            let _ = error_field(&bytes, b'C');
        }
    }
}
