//! SCRAM-SHA-256 and -PLUS (RFC 5802, RFC 7677), both ends, as PostgreSQL speaks it: no authorization identity, the
//! role's name taken from the StartupMessage, channel binding `tls-server-end-point`.
//!
//! A server's end learns the client's ClientKey from the proof: with it one can log in to every server that holds the
//! same verifier. Nothing here does I/O; nonces and salts are arguments.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

/// The mechanism without channel binding.
pub const SCRAM: &str = "SCRAM-SHA-256";
/// The mechanism with it.
pub const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Iterations of verifiers that are made here: PostgreSQL's default.
pub const ITERATIONS: u32 = 4096;

const BINDING_TYPE: &str = "tls-server-end-point";

/// A key or a hash.
pub type Key = [u8; 32];

/// What a server keeps of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct ScramVerifier {
    /// Rounds of PBKDF2.
    pub iterations: u32,
    /// Of any length.
    pub salt: Vec<u8>,
    /// SHA-256 of the ClientKey.
    pub stored_key: Key,
    /// Signs the server's last message.
    pub server_key: Key,
}

/// A verifier and the key that meets it.
#[derive(Clone, PartialEq, Eq)]
pub struct ScramKeys {
    /// The verifier of the server that the keys came from.
    pub verifier: ScramVerifier,
    /// Proves the password.
    pub client_key: Key,
}

impl fmt::Debug for ScramVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScramVerifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

impl fmt::Debug for ScramKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ScramKeys { .. }")
    }
}

/// Why an exchange ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// A message is not what the protocol says.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// The channel binding is not the one of this connection: someone may sit in between.
    #[error("SCRAM channel binding check failed")]
    Binding,
    /// The client's proof is wrong: another password.
    #[error("wrong password")]
    Proof,
    /// The server could not show that it knows the verifier.
    #[error("the server's SCRAM signature is wrong: it may not be the server that it claims to be")]
    Signature,
    /// The server ended the exchange.
    #[error("the server ended the SCRAM exchange: {0}")]
    Server(String),
}

use ScramError::Malformed;

impl ScramVerifier {
    /// Reads `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`, as pg_authid holds it.
    pub fn parse(text: &str) -> Option<ScramVerifier> {
        let (iterations, rest) = text.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        Some(ScramVerifier {
            iterations: iterations.parse().ok().filter(|n| *n > 0)?,
            salt: BASE64.decode(salt).ok()?,
            stored_key: BASE64.decode(stored_key).ok()?.try_into().ok()?,
            server_key: BASE64.decode(server_key).ok()?.try_into().ok()?,
        })
    }

    /// Is this the verifier of that password? Computes: see `ScramKeys::derive`.
    pub fn check(&self, password: &[u8]) -> bool {
        let keys = ScramKeys::derive(password, &self.salt, self.iterations);
        equal(&keys.verifier.stored_key, &self.stored_key)
    }

    /// A verifier that no password meets, for roles that do not exist: `seed` must be secret, so that nobody can tell
    /// from the salt (PostgreSQL's mock authentication).
    pub fn mock(user: &[u8], seed: &Key) -> ScramVerifier {
        let salt = hmac(seed, &[user])[..16].to_vec();
        ScramVerifier {
            iterations: ITERATIONS,
            salt,
            stored_key: hmac(seed, &[b"stored", user]),
            server_key: hmac(seed, &[b"server", user]),
        }
    }
}

impl ScramKeys {
    /// The keys of a password. CPU time: about a microsecond an iteration, so not on a thread that serves others.
    pub fn derive(password: &[u8], salt: &[u8], iterations: u32) -> ScramKeys {
        let salted = pbkdf2(&prepare(password), salt, iterations);
        let client_key = hmac(&salted, &[b"Client Key"]);
        let verifier = ScramVerifier {
            iterations,
            salt: salt.to_vec(),
            stored_key: Sha256::digest(client_key).into(),
            server_key: hmac(&salted, &[b"Server Key"]),
        };
        ScramKeys { verifier, client_key }
    }
}

/// SASLprep as PostgreSQL does it: what is not UTF-8, or holds prohibited characters, stays as it is.
fn prepare(password: &[u8]) -> Vec<u8> {
    match std::str::from_utf8(password).ok().and_then(|text| stringprep::saslprep(text).ok()) {
        Some(prepared) if !prepared.is_empty() => prepared.as_bytes().to_vec(),
        _ => password.to_vec(),
    }
}

fn mac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = mac(key);
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

/// PBKDF2 with one block of output.
fn pbkdf2(password: &[u8], salt: &[u8], iterations: u32) -> Key {
    let keyed = mac(password);
    let mut first = keyed.clone();
    first.update(salt);
    first.update(&1_u32.to_be_bytes());
    let mut block: Key = first.finalize().into_bytes().into();
    let mut sum = block;
    for _ in 1..iterations {
        let mut next = keyed.clone();
        next.update(&block);
        block = next.finalize().into_bytes().into();
        sum = xor(&sum, &block);
    }
    sum
}

fn xor(a: &Key, b: &Key) -> Key {
    std::array::from_fn(|i| a[i] ^ b[i])
}

/// Equality that takes the same time wherever two texts of one length differ.
pub(super) fn equal(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |all, (x, y)| std::hint::black_box(all | (x ^ y)));
    a.len() == b.len() && std::hint::black_box(differing) == 0
}

/// `x=value,rest`: the value of the attribute that must come next, and the rest.
fn attribute<'m>(message: &'m str, name: char, error: &'static str) -> Result<(&'m str, &'m str), ScramError> {
    let rest = message.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')).ok_or(Malformed(error))?;
    Ok(rest.split_once(',').unwrap_or((rest, "")))
}

fn text(message: &[u8]) -> Result<&str, ScramError> {
    let text = std::str::from_utf8(message).map_err(|_| Malformed("it is not UTF-8"))?;
    if text.contains('\0') { Err(Malformed("it holds a zero byte")) } else { Ok(text) }
}

/// RFC 5802: printable ASCII but for the comma.
fn is_nonce(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && b != b',')
}

/// The server's end between its two messages.
pub struct ServerExchange {
    verifier: ScramVerifier,
    /// `c=` that the client must send.
    binding: String,
    nonce: String,
    /// client-first-message-bare and server-first-message, with the commas of AuthMessage.
    transcript: String,
}

/// What the channel offers to a login, from the server's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer<'a> {
    /// `tls-server-end-point`, if -PLUS was offered.
    pub end_point: Option<&'a [u8]>,
    /// The client chose -PLUS.
    pub plus: bool,
}

impl ServerExchange {
    /// Reads the client's first message; returns ours. `nonce` must be fresh and printable without commas.
    pub fn start(
        client_first: &[u8],
        offer: Offer<'_>,
        verifier: ScramVerifier,
        nonce: &str,
    ) -> Result<(ServerExchange, String), ScramError> {
        let message = text(client_first)?;
        let (flag, rest) = message.split_once(',').ok_or(Malformed("it has no channel-binding flag"))?;
        let (identity, bare) = rest.split_once(',').ok_or(Malformed("it has no authorization identity"))?;
        if !identity.is_empty() {
            return Err(Malformed("an authorization identity is not supported"));
        }
        let mut binding = format!("{flag},,").into_bytes();
        match (flag, offer) {
            ("n", Offer { plus: false, .. }) => {}
            // The client could do it and thinks that we cannot: someone took our offer out.
            ("y", Offer { plus: false, end_point: None }) => {}
            ("y", Offer { plus: false, end_point: Some(_) }) => return Err(ScramError::Binding),
            (flag, Offer { plus: true, end_point: Some(end_point) }) => {
                if flag.strip_prefix("p=") != Some(BINDING_TYPE) {
                    return Err(Malformed("expected channel binding of type tls-server-end-point"));
                }
                binding.extend_from_slice(end_point);
            }
            _ => return Err(Malformed("the channel-binding flag does not fit the mechanism")),
        }
        if bare.starts_with("m=") {
            return Err(Malformed("it requires an extension that is not supported"));
        }
        let (_, rest) = attribute(bare, 'n', "it has no user name")?;
        let (client_nonce, _) = attribute(rest, 'r', "it has no nonce")?;
        if !is_nonce(client_nonce) {
            return Err(Malformed("the nonce has non-printable characters"));
        }
        let nonce = format!("{client_nonce}{nonce}");
        let server_first = format!("r={nonce},s={},i={}", BASE64.encode(&verifier.salt), verifier.iterations);
        let transcript = format!("{bare},{server_first},");
        Ok((ServerExchange { verifier, binding: BASE64.encode(binding), nonce, transcript }, server_first))
    }

    /// Reads the client's proof; returns our last message and the client's keys.
    pub fn finish(self, client_final: &[u8]) -> Result<(String, ScramKeys), ScramError> {
        let message = text(client_final)?;
        let (without_proof, proof) = message.rsplit_once(",p=").ok_or(Malformed("it has no proof"))?;
        let proof: Key = BASE64
            .decode(proof)
            .ok()
            .and_then(|proof| proof.try_into().ok())
            .ok_or(Malformed("the proof is not 32 bytes in base64"))?;
        let (binding, rest) = attribute(without_proof, 'c', "it has no channel binding")?;
        if !equal(binding.as_bytes(), self.binding.as_bytes()) {
            return Err(ScramError::Binding);
        }
        let (nonce, _) = attribute(rest, 'r', "it has no nonce")?;
        if !equal(nonce.as_bytes(), self.nonce.as_bytes()) {
            return Err(Malformed("the nonce does not match"));
        }
        let message = format!("{}{without_proof}", self.transcript);
        let client_key = xor(&proof, &hmac(&self.verifier.stored_key, &[message.as_bytes()]));
        let hashed: Key = Sha256::digest(client_key).into();
        if !equal(&hashed, &self.verifier.stored_key) {
            return Err(ScramError::Proof);
        }
        let signature = hmac(&self.verifier.server_key, &[message.as_bytes()]);
        let reply = format!("v={}", BASE64.encode(signature));
        Ok((reply, ScramKeys { verifier: self.verifier, client_key }))
    }
}

/// Channel binding, from the client's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding<'a> {
    /// We cannot: no TLS, or a certificate without a hash function.
    Impossible,
    /// We could, and the server did not offer it.
    NotOffered,
    /// -PLUS, over this `tls-server-end-point`.
    EndPoint(&'a [u8]),
}

impl Binding<'_> {
    /// The mechanism to ask for.
    pub fn mechanism(&self) -> &'static str {
        if let Binding::EndPoint(_) = self { SCRAM_PLUS } else { SCRAM }
    }

    fn header(&self) -> &'static str {
        match self {
            Binding::Impossible => "n,,",
            Binding::NotOffered => "y,,",
            Binding::EndPoint(_) => "p=tls-server-end-point,,",
        }
    }
}

/// The client's end after its first message.
pub struct ClientExchange {
    binding: String,
    nonce: String,
}

/// What the server said, before the proof: whose keys are needed.
pub struct Challenge {
    binding: String,
    nonce: String,
    transcript: String,
    /// Of the server's verifier.
    pub salt: Vec<u8>,
    /// Of the server's verifier.
    pub iterations: u32,
}

/// The client's end after its proof.
pub struct Proven {
    signature: Key,
}

impl ClientExchange {
    /// Our first message. `nonce` must be fresh and printable without commas.
    pub fn start(binding: Binding<'_>, nonce: &str) -> (ClientExchange, String) {
        let mut bound = binding.header().as_bytes().to_vec();
        if let Binding::EndPoint(end_point) = binding {
            bound.extend_from_slice(end_point);
        }
        let message = format!("{}n=,r={nonce}", binding.header());
        (ClientExchange { binding: BASE64.encode(bound), nonce: nonce.to_owned() }, message)
    }

    /// Reads the server's first message.
    pub fn challenge(self, server_first: &[u8]) -> Result<Challenge, ScramError> {
        let message = text(server_first)?;
        if message.starts_with("m=") {
            return Err(Malformed("it requires an extension that is not supported"));
        }
        let (nonce, rest) = attribute(message, 'r', "it has no nonce")?;
        let fresh = nonce.strip_prefix(&self.nonce).is_some_and(is_nonce);
        if !fresh {
            return Err(Malformed("the nonce does not begin with ours"));
        }
        let (salt, rest) = attribute(rest, 's', "it has no salt")?;
        let (iterations, _) = attribute(rest, 'i', "it has no iteration count")?;
        Ok(Challenge {
            binding: self.binding,
            nonce: nonce.to_owned(),
            transcript: format!("n=,r={},{message},", self.nonce),
            salt: BASE64.decode(salt).map_err(|_| Malformed("the salt is not base64"))?,
            iterations: iterations
                .parse()
                .ok()
                .filter(|n| *n > 0)
                .ok_or(Malformed("the iteration count is not a positive number"))?,
        })
    }
}

impl Challenge {
    /// Do these keys belong to the verifier that the server asks by?
    pub fn fits(&self, keys: &ScramKeys) -> bool {
        keys.verifier.salt == self.salt && keys.verifier.iterations == self.iterations
    }

    /// Our last message, proving the keys.
    pub fn prove(self, keys: &ScramKeys) -> (Proven, String) {
        let without_proof = format!("c={},r={}", self.binding, self.nonce);
        let message = format!("{}{without_proof}", self.transcript);
        let stored_key: Key = Sha256::digest(keys.client_key).into();
        let proof = xor(&keys.client_key, &hmac(&stored_key, &[message.as_bytes()]));
        let signature = hmac(&keys.verifier.server_key, &[message.as_bytes()]);
        (Proven { signature }, format!("{without_proof},p={}", BASE64.encode(proof)))
    }
}

impl Proven {
    /// Reads the server's last message: does it know the verifier?
    pub fn finish(self, server_final: &[u8]) -> Result<(), ScramError> {
        let message = text(server_final)?;
        if let Ok((error, _)) = attribute(message, 'e', "") {
            return Err(ScramError::Server(error.to_owned()));
        }
        let (signature, _) = attribute(message, 'v', "it has no signature")?;
        let signature = BASE64.decode(signature).map_err(|_| Malformed("the signature is not base64"))?;
        if equal(&signature, &self.signature) { Ok(()) } else { Err(ScramError::Signature) }
    }
}

/// A nonce of 18 random bytes, printable (PostgreSQL's length).
pub fn fresh_nonce() -> String {
    BASE64.encode(rand::random::<[u8; 18]>())
}

#[cfg(test)]
#[path = "scram_tests.rs"]
mod tests;
