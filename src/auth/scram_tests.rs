use proptest::prelude::*;

use super::*;

const PLAIN: Offer<'static> = Offer { end_point: None, plus: false };

/// A whole exchange; the keys that the server's end learned.
fn exchange(
    binding: Binding<'_>,
    offer: Offer<'_>,
    verifier: &ScramVerifier,
    password: &[u8],
) -> Result<ScramKeys, ScramError> {
    let (client, first) = ClientExchange::start(binding, "clientnonce");
    let (server, reply) = ServerExchange::start(first.as_bytes(), offer, verifier.clone(), "servernonce")?;
    let challenge = client.challenge(reply.as_bytes())?;
    let keys = ScramKeys::derive(password, &challenge.salt, challenge.iterations);
    let (proven, last) = challenge.prove(&keys);
    let (reply, learned) = server.finish(last.as_bytes())?;
    proven.finish(reply.as_bytes())?;
    Ok(learned)
}

#[test]
fn the_example_of_rfc_7677() {
    let salt = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
    let keys = ScramKeys::derive(b"pencil", &salt, 4096);
    let first = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    // The RFC's client names its user, PostgreSQL's do not: so the server's end is fed with the RFC's messages.
    let (server, reply) = ServerExchange::start(
        b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
        PLAIN,
        keys.verifier.clone(),
        "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
    )
    .unwrap();
    assert_eq!(reply, first);
    let (last, learned) = server
        .finish(
            b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
        )
        .unwrap();
    assert_eq!(last, "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    assert_eq!(learned, keys);
}

#[test]
fn both_ends_agree_with_and_without_channel_binding() {
    let keys = ScramKeys::derive("pässword".as_bytes(), b"any salt of any length", 7);
    let plus = Offer { end_point: Some(b"hash"), plus: true };
    let offered = Offer { end_point: Some(b"hash"), plus: false };
    let run = |binding, offer| exchange(binding, offer, &keys.verifier, "pässword".as_bytes());
    assert_eq!(run(Binding::Impossible, PLAIN).unwrap(), keys);
    assert_eq!(run(Binding::Impossible, offered).unwrap(), keys);
    assert_eq!(run(Binding::NotOffered, PLAIN).unwrap(), keys);
    assert_eq!(run(Binding::EndPoint(b"hash"), plus).unwrap(), keys);
    assert_eq!(run(Binding::EndPoint(b"other"), plus), Err(ScramError::Binding));
    assert_eq!(run(Binding::NotOffered, offered), Err(ScramError::Binding));
    assert!(matches!(run(Binding::EndPoint(b"hash"), offered), Err(Malformed(_))));
    assert!(matches!(run(Binding::Impossible, plus), Err(Malformed(_))));
    assert_eq!(exchange(Binding::Impossible, PLAIN, &keys.verifier, b"other"), Err(ScramError::Proof));
}

#[test]
fn keys_that_were_learned_log_in_elsewhere() {
    let keys = ScramKeys::derive(b"secret", b"salt", 3);
    let learned = exchange(Binding::Impossible, PLAIN, &keys.verifier, b"secret").unwrap();
    let (client, first) = ClientExchange::start(Binding::Impossible, "abc");
    let (server, reply) = ServerExchange::start(first.as_bytes(), PLAIN, keys.verifier.clone(), "def").unwrap();
    let challenge = client.challenge(reply.as_bytes()).unwrap();
    assert!(challenge.fits(&learned));
    let (proven, last) = challenge.prove(&learned);
    let (reply, _) = server.finish(last.as_bytes()).unwrap();
    assert_eq!(proven.finish(reply.as_bytes()), Ok(()));
}

#[test]
fn a_server_that_does_not_know_the_verifier_is_found_out() {
    let keys = ScramKeys::derive(b"secret", b"salt", 3);
    let prove = || {
        let (client, _) = ClientExchange::start(Binding::Impossible, "abc");
        client.challenge(b"r=abcdef,s=c2FsdA==,i=3").unwrap().prove(&keys).0
    };
    assert_eq!(prove().finish(format!("v={}", BASE64.encode([0; 32])).as_bytes()), Err(ScramError::Signature));
    assert_eq!(prove().finish(b"v="), Err(ScramError::Signature));
    assert!(matches!(prove().finish(b"e=other-error"), Err(ScramError::Server(_))));
    for first in
        ["r=abc,s=c2FsdA==,i=3", "r=xabcdef,s=c2FsdA==,i=3", "r=abcd,s=c2FsdA==,i=0", "r=abcd,i=3", "m=x,r=abcd"]
    {
        let (client, _) = ClientExchange::start(Binding::Impossible, "abc");
        assert!(matches!(client.challenge(first.as_bytes()), Err(Malformed(_))), "{first}");
    }
}

#[test]
fn verifiers_are_read_as_pg_authid_holds_them() {
    let text = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
    let verifier = ScramVerifier::parse(text).unwrap();
    assert!(verifier.check(b"pencil") && !verifier.check(b"pen"));
    for bad in ["", "SCRAM-SHA-256$", "SCRAM-SHA-256$0:W22ZaA==$a:b", &text[..100], &text.replace("4096", "-1")] {
        assert_eq!(ScramVerifier::parse(bad), None, "{bad}");
    }
}

#[test]
fn passwords_are_prepared_as_postgresql_does() {
    // RFC 4013: a soft hyphen is nothing, a Roman one is IX; prohibited or no UTF-8: as it is.
    assert_eq!(prepare("I\u{ad}X".as_bytes()), b"IX");
    assert_eq!(prepare("\u{2168}".as_bytes()), b"IX");
    assert_eq!(prepare(b"a\x07b"), b"a\x07b");
    assert_eq!(prepare(b"\xff\xfe"), b"\xff\xfe");
}

proptest! {
    #[test]
    fn fuzz_any_messages_are_read_without_panic(
        first in "(n|y|p=tls-server-end-point|[a-z=]{0,4}),[a-z=]{0,3},?(n=[a-z]{0,4},)?(r=.{0,8})?",
        last in "(c=[a-zA-Z=]{0,6},)?(r=[a-z]{0,6})?(,p=[a-zA-Z0-9+/]{0,43}=?)?",
        bytes in proptest::collection::vec(any::<u8>(), 0..80),
        plus in any::<bool>(),
    ) {
        let verifier = ScramVerifier::mock(b"user", &[1; 32]);
        for message in [first.as_bytes(), &bytes[..]] {
            let offer = Offer { end_point: plus.then_some(b"hash"), plus };
            if let Ok((server, _)) = ServerExchange::start(message, offer, verifier.clone(), "nonce") {
                prop_assert!(server.finish(last.as_bytes()).is_err());
            }
            let (client, _) = ClientExchange::start(Binding::NotOffered, "abc");
            if let Ok(challenge) = client.challenge(message) {
                let _ = challenge.prove(&ScramKeys::derive(b"x", b"y", 1)).0.finish(last.as_bytes());
            }
        }
        let _ = ScramVerifier::parse(&String::from_utf8_lossy(&bytes));
    }
}
