//! Values as operators write them: `2s`, `64MiB`, `10%`. A value that came from `${NAME}` is a string, so that numbers
//! and booleans are read from strings too. No message repeats a value: it may be a secret in the wrong place.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// A share of something, 0.0 to 1.0; written `10%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Share(pub f64);

impl Share {
    /// Reads `10%`, `0.5%` or `0`.
    pub fn parse(text: &str) -> Option<Share> {
        let percent = match text.trim().strip_suffix('%') {
            Some(number) => plain_number(number)?,
            None => Some(0.0).filter(|_| text.trim() == "0")?,
        };
        (percent <= 100.0).then_some(Share(percent / 100.0))
    }
}

/// Reads `500ms`, `2s`, `5m` (or `5min`), `3h`, `7d`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "" if number == 0.0 => 1.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * seconds).ok()
}

/// Reads `64MiB`, `1GiB`, `8kB`, `1MB` (as PostgreSQL, powers of 1024), `4096` or `4096B` (bytes).
pub fn parse_size(text: &str) -> Option<usize> {
    let (number, unit) = split_unit(text)?;
    let shift = match unit {
        "" | "B" => 0,
        "kB" | "KB" | "KiB" => 10,
        "MB" | "MiB" => 20,
        "GB" | "GiB" => 30,
        "TB" | "TiB" => 40,
        _ => return None,
    };
    let bytes = number * (1_u64 << shift) as f64;
    // 2^48 bytes is more than any limit can mean, and is exact in a float.
    (bytes <= (1_u64 << 48) as f64).then_some(bytes as usize)
}

fn split_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((plain_number(number)?, unit.trim_start()))
}

/// Digits with at most one point: no sign, exponent, `inf` or `nan`, which `f64` would take.
fn plain_number(text: &str) -> Option<f64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if plain { text.parse().ok() } else { None }
}

/// A scalar's text, whatever YAML took it for; `expected` is what the message asks for.
struct Scalar<F> {
    expected: &'static str,
    read: F,
}

impl<T, F: Fn(&str) -> Option<T>> Visitor<'_> for Scalar<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.read)(text).ok_or_else(|| E::custom(format_args!("expected {}", self.expected)))
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<T, E> {
        self.visit_str(if value { "true" } else { "false" })
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<T, E> {
        self.visit_str(&value.to_string())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<T, E> {
        self.visit_str(&value.to_string())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<T, E> {
        self.visit_str(&value.to_string())
    }
}

/// Reads any scalar with `read`, or says what was `expected`.
pub(super) fn scalar<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &'static str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    deserializer.deserialize_any(Scalar { expected, read })
}

const DURATION: &str = "a duration such as 500ms, 2s, 5min or 7d";
const COUNT: &str = "a whole number, 0 or more";
const FLAG: &str = "true or false";

pub(super) fn duration<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    scalar(d, DURATION, parse_duration)
}

pub(super) fn some_duration<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
    scalar(d, DURATION, |text| parse_duration(text).map(Some))
}

pub(super) fn size<'de, D: Deserializer<'de>>(d: D) -> Result<usize, D::Error> {
    scalar(d, "a size such as 64MiB, 1GiB or 8kB", |text| parse_size(text).filter(|size| *size > 0))
}

pub(super) fn some_size<'de, D: Deserializer<'de>>(d: D) -> Result<Option<usize>, D::Error> {
    size(d).map(Some)
}

pub(super) fn count<'de, D: Deserializer<'de>>(d: D) -> Result<usize, D::Error> {
    scalar(d, COUNT, |text| text.parse().ok())
}

pub(super) fn some_count<'de, D: Deserializer<'de>>(d: D) -> Result<Option<usize>, D::Error> {
    scalar(d, COUNT, |text| text.parse().ok().map(Some))
}

pub(super) fn at_least_one<'de, D: Deserializer<'de>>(d: D) -> Result<usize, D::Error> {
    scalar(d, "a whole number, 1 or more", |text| text.parse().ok().filter(|n| *n > 0))
}

pub(super) fn flag<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    scalar(d, FLAG, |text| text.parse().ok())
}

pub(super) fn some_flag<'de, D: Deserializer<'de>>(d: D) -> Result<Option<bool>, D::Error> {
    scalar(d, FLAG, |text| text.parse().ok().map(Some))
}

pub(super) fn is_json<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    scalar(d, "text or json", |text| match text {
        "text" => Some(false),
        "json" => Some(true),
        _ => None,
    })
}

pub(super) fn log_filter<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    scalar(d, "a level (error, warn, info, debug, trace) or a tracing filter such as info,crossfade=debug", |text| {
        tracing_subscriber::EnvFilter::try_new(text).ok().map(|_| text.to_owned())
    })
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Share, D::Error> {
        scalar(d, "a share from 0% to 100%, such as 10%", Share::parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_sizes_and_shares() {
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("7d"), Some(Duration::from_secs(604_800)));
        assert_eq!(parse_duration("1.5 h"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
        for bad in ["", "5", "s", "-1s", "1e3s", "infs", "2 weeks", "99999999999999999999999d", "1.2.3s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        assert_eq!(parse_size("64MiB"), Some(64 << 20));
        assert_eq!(parse_size("8kB"), Some(8192));
        assert_eq!(parse_size("100"), Some(100));
        for bad in ["", "MiB", "-1", "1 XB", "9999999TiB"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
        assert_eq!(Share::parse("10%"), Some(Share(0.1)));
        assert_eq!(Share::parse("0"), Some(Share(0.0)));
        for bad in ["0.1", "101%", "-1%", "%", "nan%"] {
            assert_eq!(Share::parse(bad), None, "{bad}");
        }
    }
}
