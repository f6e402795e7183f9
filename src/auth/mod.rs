//! Who a client is, and how the proxy proves it to the servers.
//!
//! `scram` and `md5` are plain functions over messages; `verifiers` knows what each role's password must hash to;
//! `client` runs a client's login and hands out the `Credentials` with which `backend::connect` logs in as that client.

pub mod client;
pub mod md5;
pub mod scram;
pub mod verifiers;

use std::fmt;

use bytes::Bytes;
use scram::ScramKeys;

/// What is known of a role's secret: enough to log in to servers as that role. At most one login's worth is used.
#[derive(Clone)]
pub struct Credentials {
    /// The role, as bytes of the StartupMessage.
    pub user: Bytes,
    /// The password in the clear, from `users:`, a URL or a cleartext login.
    pub password: Option<Vec<u8>>,
    /// Keys won from a SCRAM login: good at every server that holds the same verifier.
    pub scram: Option<ScramKeys>,
    /// `md5...`, as pg_authid holds it: good at every server that asks for MD5.
    pub md5: Option<String>,
    /// Has the secret been checked by the proxy? If not, a server that lets the proxy in without asking for a
    /// password has proven nothing, and the login fails.
    pub checked: bool,
}

impl Credentials {
    /// A role with a password, such as a control role; None: the server must not ask for one.
    pub fn new(user: impl Into<Bytes>, password: Option<&str>) -> Credentials {
        Credentials {
            user: user.into(),
            password: password.map(|text| text.as_bytes().to_vec()),
            scram: None,
            md5: None,
            checked: true,
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}
