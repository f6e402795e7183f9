//! PostgreSQL's MD5 passwords: stored is `md5` + hex(md5(password + role)); sent is `md5` + hex(md5(hex + salt)).

use md5::{Digest, Md5};

use super::scram::equal;

fn hex(parts: &[&[u8]]) -> String {
    let mut hash = Md5::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Is this what pg_authid holds for an MD5 password?
pub fn is_stored(text: &str) -> bool {
    text.strip_prefix("md5").is_some_and(|rest| rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// What pg_authid would hold.
pub fn stored(user: &[u8], password: &[u8]) -> String {
    format!("md5{}", hex(&[password, user]))
}

/// What a client sends for a stored hash and the server's salt.
pub fn response(stored: &str, salt: [u8; 4]) -> String {
    let hash = stored.strip_prefix("md5").unwrap_or(stored);
    format!("md5{}", hex(&[hash.as_bytes(), &salt]))
}

/// Is this the response? Takes the same time whatever differs.
pub fn check(stored: &str, salt: [u8; 4], answer: &[u8]) -> bool {
    equal(response(stored, salt).as_bytes(), answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_hash() {
        // SELECT 'md5' || md5('passwordalice')
        let kept = stored(b"alice", b"password");
        assert_eq!(kept, "md5dc9478eb4e94a7dcf2bda02360188a52");
        assert!(is_stored(&kept) && !is_stored("md5xyz") && !is_stored("secret"));
        let answer = response(&kept, [1, 2, 3, 4]);
        assert!(check(&kept, [1, 2, 3, 4], answer.as_bytes()));
        assert!(!check(&kept, [1, 2, 3, 5], answer.as_bytes()));
        assert!(!check(&kept, [1, 2, 3, 4], b""));
    }
}
