//! TLS on both legs: the server that clients meet, the client that PostgreSQL meets, and what ties a login to either.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::der::{Decode, Encode};

/// The ALPN name of PostgreSQL's protocol, which direct TLS must negotiate.
pub const ALPN: &[u8] = b"postgresql";

/// Why certificates or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{what} {} cannot be read: {error}", path.display())]
    File {
        /// `certificate`, `key`, `client_ca` or `sslrootcert`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// A file holds nothing of its kind.
    #[error("{what} {} holds no PEM {expected}", path.display())]
    Empty {
        /// As in `File`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// `certificate` or `private key`.
        expected: &'static str,
    },
    /// They do not fit together, or are of a kind that is not supported.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// TLS towards clients.
#[derive(Clone)]
pub struct ServerTls {
    /// For the handshake.
    pub config: Arc<ServerConfig>,
    /// `tls-server-end-point` of our certificate; None where its algorithm has none (Ed25519): no -PLUS then.
    pub end_point: Option<Vec<u8>>,
    /// Clients without TLS are refused.
    pub required: bool,
}

impl ServerTls {
    /// Reads PEM files. With `client_ca` TLS clients must show a certificate that it signed.
    pub fn load(
        certificate: &Path,
        key: &Path,
        client_ca: Option<&Path>,
        required: bool,
    ) -> Result<ServerTls, TlsError> {
        let chain = certificates("certificate", certificate)?;
        let key = private_key(key)?;
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Setup(error.to_string()))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Arc::new(root_store(certificates("client_ca", path)?));
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|error| TlsError::Setup(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let end_point = end_point(&chain[0]);
        let mut config = builder.with_single_cert(chain, key).map_err(|error| TlsError::Setup(error.to_string()))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(ServerTls { config: Arc::new(config), end_point, required })
    }
}

/// What a server's certificate must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerCheck {
    /// Anything.
    Nothing,
    /// Signed by one of the roots.
    Chain,
    /// That, and for the host's name.
    ChainAndName,
}

/// TLS towards PostgreSQL. `roots` is a PEM file; None: the system's, else Mozilla's. They are read only if checked.
pub fn client_config(check: ServerCheck, roots: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let roots = match (check, roots) {
        (ServerCheck::Nothing, _) => Vec::new(),
        (_, Some(path)) => certificates("sslrootcert", path)?,
        (_, None) => rustls_native_certs::load_native_certs().certs,
    };
    let webpki = if check == ServerCheck::Nothing {
        None
    } else {
        let mut store = root_store(roots.clone());
        if store.is_empty() && roots.is_empty() {
            store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone()).build().ok()
    };
    let verifier = Verifier { check, roots, webpki, provider: provider.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Setup(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// `tls-server-end-point` (RFC 5929, section 4.1): the hash of the certificate by its signature's own hash function,
/// SHA-256 in place of MD5 and SHA-1. None for signatures without one.
pub fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let parsed = x509_cert::Certificate::from_der(certificate).ok()?;
    let algorithm = parsed.signature_algorithm.oid.to_string();
    let sha256 = || Some(Sha256::digest(certificate).to_vec());
    match algorithm.as_str() {
        // md5, sha1, sha256 with RSA; ecdsa with SHA1, SHA256
        "1.2.840.113549.1.1.4" | "1.2.840.113549.1.1.5" | "1.2.840.113549.1.1.11" => sha256(),
        "1.2.840.10045.4.1" | "1.2.840.10045.4.3.2" => sha256(),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(what, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::Empty { what, path: path.to_owned(), expected: "certificate" }),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read("key", path)?).map_err(|_| TlsError::Empty {
        what: "key",
        path: path.to_owned(),
        expected: "private key (one without a passphrase)",
    })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| TlsError::File { what, path: path.to_owned(), error })
}

fn root_store(certificates: Vec<CertificateDer<'static>>) -> RootCertStore {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(certificates);
    store
}

/// Checks as libpq does with OpenSSL, where webpki alone is stricter than what PostgreSQL's own instructions make:
/// a self-signed certificate may be its own root, and a certificate without names may say its host in CN.
#[derive(Debug)]
struct Verifier {
    check: ServerCheck,
    roots: Vec<CertificateDer<'static>>,
    /// None: no root can be used but by being the very certificate.
    webpki: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn verify_chain(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        if self.roots.iter().any(|root| root == certificate) {
            return verify_dates(certificate, now);
        }
        let Some(webpki) = &self.webpki else {
            return Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer));
        };
        match webpki.verify_server_cert(certificate, intermediates, name, &[], now) {
            // The name is looked at last, and by us: the chain is good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

fn verify_dates(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let parsed = x509_cert::Certificate::from_der(certificate)
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let validity = &parsed.tbs_certificate.validity;
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(rustls::Error::InvalidCertificate(CertificateError::NotValidYet));
    }
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(rustls::Error::InvalidCertificate(CertificateError::Expired));
    }
    Ok(())
}

fn verify_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), rustls::Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    let result = rustls::client::verify_server_name(&parsed, name);
    match (&result, name) {
        (Err(_), ServerName::DnsName(dns)) if common_name_matches(certificate, dns.as_ref()) => Ok(()),
        _ => result,
    }
}

/// RFC 6125, section 6.4.4, as libpq reads it: CN counts only where the certificate has no alternative names.
fn common_name_matches(certificate: &CertificateDer<'_>, host: &str) -> bool {
    let Ok(parsed) = x509_cert::Certificate::from_der(certificate) else { return false };
    let extensions = parsed.tbs_certificate.extensions.iter().flatten();
    if extensions.into_iter().any(|extension| extension.extn_id.to_string() == "2.5.29.17") {
        return false;
    }
    let attributes = parsed.tbs_certificate.subject.0.iter().flat_map(|rdn| rdn.0.iter());
    let names: Vec<Vec<u8>> = attributes
        .filter(|attribute| attribute.oid.to_string() == "2.5.4.3")
        .filter_map(|attribute| attribute.value.to_der().ok())
        .filter_map(|der| x509_cert::der::Any::from_der(&der).ok().map(|any| any.value().to_vec()))
        .collect();
    names.iter().any(|name| {
        let Ok(name) = std::str::from_utf8(name) else { return false };
        match name.strip_prefix("*.") {
            Some(suffix) => host.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(suffix)),
            None => name.eq_ignore_ascii_case(host),
        }
    })
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.check != ServerCheck::Nothing {
            self.verify_chain(certificate, intermediates, name, now)?;
        }
        if self.check == ServerCheck::ChainAndName {
            verify_name(certificate, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
