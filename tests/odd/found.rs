//! What random conversations (`twin`) have found once, each as the shortest conversation that shows it: answered as by a server that stands alone, and all rows
//! are the same.

use crate::assert_equal_at_rest;
use crate::common::pair::{DATABASE, TRUST};
use crate::common::{Databases, Pair, Proxy, compare, raw};
use crate::statements::SCHEMA;
use crate::twin::{Both, twin};

fn run(text: &str) -> Vec<u8> {
    [raw::parse("", text, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat()
}

/// A pipeline up to its Sync.
fn piped(parts: &[Vec<u8>]) -> Vec<u8> {
    [parts.concat(), raw::sync()].concat()
}

/// Conversations: a name, and what is sent at once, each with one ReadyForQuery.
fn conversations() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let bound = |portal: &str, statement: &str| raw::bind(portal, statement, &[], &[], &[]);
    let nonsense = || raw::parse("", "SELEC nonsense", &[]);
    vec![
        (
            "Close of a statement that is passed over",
            vec![
                piped(&[raw::parse("s1", "INSERT INTO plain VALUES (501, 1)", &[])]),
                piped(&[nonsense(), raw::close(b'S', "s1")]),
                piped(&[bound("", "s1"), raw::describe(b'P', ""), raw::execute("", 0)]),
            ],
        ),
        (
            "Bind of a portal that is passed over, and one that fails",
            vec![
                raw::query("BEGIN"),
                piped(&[
                    raw::parse("s2", "INSERT INTO plain VALUES (502, 1), (503, 1) RETURNING id", &[]),
                    raw::parse("s3", "SELECT id FROM plain WHERE id = $1", &[]),
                    bound("p1", "s2"),
                ]),
                raw::query("SAVEPOINT s"),
                piped(&[nonsense(), raw::close(b'P', "p1"), bound("p1", "s3")]),
                raw::query("ROLLBACK TO s"),
                piped(&[bound("p1", "s3")]),
                raw::query("ROLLBACK TO s"),
                piped(&[raw::describe(b'P', "p1"), raw::execute("p1", 1), raw::execute("p1", 0)]),
                raw::query("COMMIT"),
            ],
        ),
        (
            "BEGIN with modes behind a write in one pipeline",
            vec![
                piped(&[run("INSERT INTO plain VALUES (504, 1)"), run("BEGIN DEFERRABLE")]),
                raw::query("SHOW transaction_deferrable"),
                raw::query("COMMIT"),
                piped(&[run("INSERT INTO plain VALUES (505, 1)"), run("START TRANSACTION")]),
                raw::query("INSERT INTO plain VALUES (506, 1)"),
                raw::query("ROLLBACK"),
                piped(&[run("INSERT INTO plain VALUES (507, 1)"), run("BEGIN ISOLATION LEVEL SERIALIZABLE")]),
                raw::query("SELECT count(*) FROM plain WHERE id BETWEEN 504 AND 507"),
            ],
        ),
        (
            "BEGIN with modes behind a write in one Query",
            vec![
                raw::query("INSERT INTO plain VALUES (508, 1); BEGIN DEFERRABLE; SHOW transaction_deferrable"),
                raw::query("COMMIT"),
                raw::query("INSERT INTO plain VALUES (509, 1); START TRANSACTION; INSERT INTO plain VALUES (510, 1)"),
                raw::query("ROLLBACK"),
            ],
        ),
        (
            "the last of several statements is complete when it is committed",
            vec![
                raw::query("INSERT INTO later VALUES (501, 1); INSERT INTO later VALUES (501, 2)"),
                raw::query("SELECT 1; INSERT INTO plain VALUES (508, 2)"),
                raw::query("INSERT INTO plain VALUES (511, 1); COMMIT; SELEC nonsense"),
            ],
        ),
        (
            "errors of EXECUTE name the client's statement",
            vec![
                raw::query("PREPARE q (int) AS INSERT INTO plain VALUES ($1, 3)"),
                raw::query("EXECUTE q (512)"),
                raw::query("EXECUTE q (513, 2)"),
                piped(&[run("EXECUTE q")]),
                raw::query("EXECUTE q (512)"),
                raw::query("DEALLOCATE q"),
                raw::query("EXECUTE q (514)"),
            ],
        ),
        (
            "portals that are not there, or were run",
            vec![
                piped(&[raw::parse("", "INSERT INTO plain VALUES (515, 1)", &[]), bound("", "")]),
                piped(&[raw::describe(b'P', "")]),
                piped(&[raw::execute("", 0)]),
                piped(&[
                    raw::parse("", "INSERT INTO plain VALUES (521, 1)", &[]),
                    bound("p4", ""),
                    raw::execute("p4", 0),
                    raw::describe(b'P', ""),
                ]),
                piped(&[
                    raw::parse("", "INSERT INTO plain VALUES (522, 1)", &[]),
                    bound("p4", ""),
                    raw::execute("p4", 0),
                    raw::execute("", 0),
                ]),
                piped(&[run("INSERT INTO plain VALUES (516, 1)"), raw::execute("", 0)]),
                piped(&[
                    raw::parse("", "INSERT INTO plain VALUES (517, 1)", &[]),
                    bound("p2", ""),
                    raw::execute("p2", 0),
                    raw::execute("p2", 0),
                ]),
            ],
        ),
        (
            "what is bound behind the end of a transaction",
            vec![
                raw::query("BEGIN"),
                piped(&[
                    run("INSERT INTO plain VALUES (518, 1)"),
                    run("COMMIT"),
                    raw::parse("", "INSERT INTO plain VALUES (519, 1) RETURNING v", &[]),
                    bound("p3", ""),
                    raw::describe(b'P', "p3"),
                    raw::execute("p3", 0),
                ]),
                raw::query("BEGIN"),
                piped(&[run("ABORT"), run("BEGIN"), raw::execute("", 0)]),
                raw::query("ROLLBACK"),
            ],
        ),
        (
            "DISCARD ALL in front of others in a block that has failed",
            vec![
                raw::query("BEGIN"),
                raw::query("SELECT 1 / 0"),
                raw::query("DISCARD ALL; SELECT 1"),
                raw::query("ROLLBACK"),
                raw::query("INSERT INTO plain VALUES (520, 1)"),
            ],
        ),
        (
            "a key that changes on a table whose trigger takes rows out",
            vec![
                raw::query("UPDATE picky SET id = id + 100 RETURNING v"),
                raw::query("SELECT id, v FROM picky ORDER BY id"),
            ],
        ),
    ]
}

/// A trigger that takes rows out of what an UPDATE changes, and draws a number each time.
const PICKY: &str = "CREATE SEQUENCE drawn;
    CREATE TABLE picky (id int PRIMARY KEY, v int);
    INSERT INTO picky VALUES (1, 0), (2, 0), (3, 0);
    CREATE FUNCTION picks() RETURNS trigger LANGUAGE plpgsql AS
      $$BEGIN NEW.v := nextval('drawn'); RETURN CASE WHEN OLD.id = 2 THEN NULL ELSE NEW END; END$$;
    CREATE TRIGGER picks BEFORE UPDATE ON picky FOR EACH ROW EXECUTE FUNCTION picks();";

#[tokio::test(flavor = "multi_thread")]
async fn what_was_found_once_is_answered_as_by_a_server_that_stands_alone() {
    let schema = format!("{SCHEMA}\n{PICKY}");
    let (twin, databases) = tokio::join!(twin(&schema), Databases::start_trusting());
    databases.run_on_both(&schema).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", TRUST)).await;
    proxy.set_phase("dual-write").await;
    let pair = Pair { proxy, databases };
    pair.proxy.settle().await;
    for (name, exchanges) in conversations() {
        let mut both = Both::connect(&twin, &pair).await;
        for (number, bytes) in exchanges.iter().enumerate() {
            let said = format!("{name}, exchange {number}");
            let frames = both.say(bytes, 1, &said, false).await;
            println!("{said} -> {}", raw::tags(&frames));
        }
    }
    assert_equal_at_rest(&pair).await;
    compare::assert_equal(&twin, &pair.databases.old, DATABASE, &[]).await;
}
