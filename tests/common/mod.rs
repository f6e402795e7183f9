//! What the tests on real servers share.
//!
//! [`Pair::start`] gives two clusters and Crossfade between a client and them; [`link::Link`] is a TCP line that can be cut,
//! stalled and watched; [`compare::assert_equal`] looks at both databases' rows by means of its own; [`raw`] speaks the
//! protocol byte by byte. Everything is killed on drop, ports are free ones, tests run in parallel.

#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod compare;
pub mod copy;
pub mod lazily;
pub mod link;
pub mod load;
pub mod pair;
pub mod pgbench;
pub mod proxy;
pub mod raw;
pub mod standby;

use std::time::{Duration, Instant};

#[allow(unused_imports, reason = "each test binary uses a part of this")]
pub use pair::{Databases, Pair};
#[allow(unused_imports, reason = "each test binary uses a part of this")]
pub use proxy::{Proxy, ProxyConfig};

/// How long anything that must happen may take: long, since machines are slow now and then, and no test times anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// True before a release: everything longer.
pub fn proof() -> bool {
    std::env::var_os("CROSSFADE_PROOF").is_some()
}

/// [`PATIENCE`], or what millions of rows need of a debug build.
fn patience() -> Duration {
    if proof() { PATIENCE * 20 } else { PATIENCE }
}

/// Waits until a condition holds, looking every 10 ms.
///
/// # Panics
/// It does not hold within [`patience`]; names `what`.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + patience();
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {:?}: {what}", patience());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
