use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

use super::*;

fn params(names: &[&str], common_name: &str) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn authority() -> (CertificateDer<'static>, Issuer<'static, KeyPair>) {
    let mut params = params(&[], "An authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().der().clone(), Issuer::new(params, key))
}

fn signed(params: &CertificateParams, issuer: &Issuer<'_, KeyPair>) -> CertificateDer<'static> {
    params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().der().clone()
}

fn self_signed(params: &CertificateParams) -> CertificateDer<'static> {
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
}

/// Would `host`'s certificate do, with `root` as the only root?
fn accepts(check: ServerCheck, root: &CertificateDer<'static>, certificate: &CertificateDer<'_>, host: &str) -> bool {
    let store = Arc::new(root_store(vec![root.clone()]));
    let webpki = WebPkiServerVerifier::builder_with_provider(store, provider()).build().ok();
    let verifier = Verifier { check, roots: vec![root.clone()], webpki, provider: provider() };
    let name = ServerName::try_from(host.to_owned()).unwrap();
    verifier.verify_server_cert(certificate, &[], &name, &[], UnixTime::now()).is_ok()
}

use ServerCheck::{Chain, ChainAndName, Nothing};

#[test]
fn chain_and_name() {
    let (root, issuer) = authority();
    let (other, _) = authority();
    let certificate = signed(&params(&["db.example", "*.wild.example", "10.0.0.1"], "ignored.example"), &issuer);
    for host in ["db.example", "a.wild.example", "10.0.0.1"] {
        assert!(accepts(ChainAndName, &root, &certificate, host), "{host}");
    }
    for host in ["ignored.example", "a.b.wild.example", "10.0.0.2"] {
        assert!(!accepts(ChainAndName, &root, &certificate, host), "{host}");
        assert!(accepts(Chain, &root, &certificate, host), "{host}");
        assert!(!accepts(Chain, &other, &certificate, host), "{host}");
        assert!(accepts(Nothing, &other, &certificate, host), "{host}");
    }
}

#[test]
fn a_common_name_counts_where_there_are_no_others() {
    let (root, issuer) = authority();
    let plain = signed(&params(&[], "DB.example"), &issuer);
    let wild = signed(&params(&[], "*.example"), &issuer);
    assert!(accepts(ChainAndName, &root, &plain, "db.example"));
    assert!(!accepts(ChainAndName, &root, &plain, "other.example"));
    assert!(!accepts(ChainAndName, &root, &plain, "10.0.0.1"));
    assert!(accepts(ChainAndName, &root, &wild, "db.example"));
    assert!(!accepts(ChainAndName, &root, &wild, "a.db.example"));
    assert!(!accepts(ChainAndName, &root, &wild, "example"));
}

/// What PostgreSQL's documentation has people make: `openssl req -x509 ... -subj /CN=host`, given as sslrootcert.
#[test]
fn a_self_signed_certificate_is_its_own_root() {
    for is_ca in [IsCa::NoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
        let mut params = params(&[], "db.example");
        params.is_ca = is_ca;
        let certificate = self_signed(&params);
        assert!(accepts(ChainAndName, &certificate, &certificate, "db.example"));
        assert!(!accepts(ChainAndName, &certificate, &certificate, "other.example"));
        assert!(accepts(Chain, &certificate, &certificate, "other.example"));
        // Another one of the same name is another one.
        assert!(!accepts(Chain, &self_signed(&params), &certificate, "db.example"));
    }
}

#[test]
fn dates_are_checked() {
    let (root, issuer) = authority();
    for (from, until, good) in [(1990, 2000, false), (2000, 2200, true), (2199, 2200, false)] {
        let mut params = params(&["db.example"], "x");
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let one = signed(&params, &issuer);
        assert_eq!(accepts(Chain, &root, &one, "db.example"), good, "{from}");
        let own = self_signed(&params);
        assert_eq!(accepts(Chain, &own, &own, "db.example"), good, "{from}");
    }
}

#[test]
fn the_end_point_is_hashed_as_the_signature_says() {
    for (algorithm, length) in [
        (&rcgen::PKCS_ECDSA_P256_SHA256, Some(32)),
        (&rcgen::PKCS_ECDSA_P384_SHA384, Some(48)),
        (&rcgen::PKCS_ED25519, None),
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let certificate = params(&["db.example"], "x").self_signed(&key).unwrap().der().clone();
        assert_eq!(end_point(&certificate).map(|hash| hash.len()), length);
    }
    assert_eq!(end_point(&CertificateDer::from(vec![1, 2, 3])), None);
}
