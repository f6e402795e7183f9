//! Each statement goes to the side of its tables; a block is one block, whatever sides it is open on.

use tokio_postgres::error::SqlState;

use crate::common::Pair;
use crate::{on, refusal, split, value};

#[tokio::test]
async fn statements_go_to_the_side_of_their_tables() {
    let mut pair = split("new-primary", "").await;
    for phase in ["new-primary", "old-read-only", "new"] {
        if phase != "new-primary" {
            pair.proxy.set_phase(phase).await;
        }
        let client = pair.client().await;
        let (old, new) = (&pair.databases.old, &pair.databases.new);
        // Simple and extended, autocommit.
        client.batch_execute(&format!("INSERT INTO orders (note) VALUES ('{phase}')")).await.expect("a staying table");
        client.execute("UPDATE orders SET amount = amount + 1 WHERE id = $1", &[&1]).await.expect("extended");
        let name = format!("of {phase}");
        client.execute("UPDATE attachments SET name = $1 WHERE id = 1", &[&name]).await.expect("a migrating table");
        assert_eq!(on(new, "SELECT name FROM attachments WHERE id = 1").await, name);
        assert_eq!(on(old, &format!("SELECT count(*) FROM orders WHERE note = '{phase}'")).await, "1");
        // Prepared once, used in turn; a view over staying tables.
        let orders = client.prepare("SELECT count(*) FROM orders WHERE id > $1").await.expect("prepares");
        let attachments = client.prepare("SELECT count(*) FROM attachments WHERE id > $1").await.expect("prepares");
        for _ in 0..3 {
            assert!(client.query_one(&orders, &[&0]).await.expect("old").get::<_, i64>(0) >= 10);
            assert_eq!(client.query_one(&attachments, &[&0]).await.expect("new").get::<_, i64>(0), 10);
        }
        assert_eq!(value(&client, "SELECT count(*) FROM rich").await, "0");
        // COPY both ways, and sequences of staying tables.
        let sink = client.copy_in("COPY audit FROM STDIN").await.expect("copies");
        futures_util::pin_mut!(sink);
        futures_util::SinkExt::send(&mut sink, bytes::Bytes::from(format!("{phase}\n"))).await.expect("sends");
        sink.finish().await.expect("ends");
        assert_eq!(on(old, &format!("SELECT count(*) FROM audit WHERE what = '{phase}'")).await, "1");
        let drawn: i32 = value(&client, "SELECT nextval('orders_id_seq')").await.parse().expect("a number");
        assert_eq!(on(old, "SELECT last_value FROM orders_id_seq").await, drawn.to_string());
        client.batch_execute("INSERT INTO orders (note) VALUES ('drawn')").await.expect("draws");
        assert_eq!(value(&client, "SELECT lastval()").await, (drawn + 1).to_string());
        // SQL's PREPARE, and a cursor.
        client.batch_execute("PREPARE p (int) AS SELECT note FROM orders WHERE id = $1").await.expect("prepares");
        assert_eq!(value(&client, "EXECUTE p (2)").await, "o2");
        client.batch_execute("BEGIN; DECLARE c CURSOR FOR SELECT note FROM orders ORDER BY id").await.err();
        client.batch_execute("ROLLBACK").await.expect("ends");
        client.batch_execute("BEGIN").await.expect("begins");
        client.batch_execute("DECLARE c CURSOR FOR SELECT note FROM orders ORDER BY id").await.expect("declares");
        assert_eq!(value(&client, "FETCH c").await, "o1");
        client.batch_execute("COMMIT").await.expect("commits");
        // What needs both is refused, and the session goes on.
        for both in [
            "SELECT * FROM orders JOIN attachments ON order_id = orders.id",
            "SELECT * FROM joined",
            "INSERT INTO audit SELECT name FROM attachments",
        ] {
            assert_eq!(refusal(&client, both).await, "0A000", "{both}");
        }
        assert_eq!(
            client.query("SELECT 1 FROM orders, attachments", &[]).await.expect_err("both").code(),
            Some(&SqlState::FEATURE_NOT_SUPPORTED)
        );
        assert_eq!(value(&client, "SELECT count(*) FROM attachments").await, "10");
        // What a driver drops is dropped on old, too.
        drop(orders);
        client.batch_execute("INSERT INTO orders (note) VALUES ('x')").await.expect("writes");
        let left = "SELECT count(*) FROM (SELECT count(*) FROM orders) o, pg_prepared_statements WHERE statement LIKE '%FROM orders WHERE id >%'";
        assert_eq!(value(&client, left).await, "0");
        client.batch_execute("DEALLOCATE ALL").await.expect("forgets");
        assert_eq!(refusal(&client, "EXECUTE p (2)").await, "26000");
        if phase == "new-primary" {
            pair.proxy.settle().await;
            assert_eq!(on(old, "SELECT name FROM attachments WHERE id = 1").await, name);
        }
    }
}

#[tokio::test]
async fn a_session_is_one_whatever_its_two_servers() {
    let pair = split("new-primary", "").await;
    settings_hold_on_both_sides(&pair).await;
    a_driver_sends_begin_in_the_pipeline_of_what_follows(&pair).await;
    a_session_on_old_that_was_ended_comes_back(&pair).await;
}

async fn settings_hold_on_both_sides(pair: &Pair) {
    let client = pair.client().await;
    let zone = "SELECT current_setting('timezone') || ' ' || coalesce(current_setting('app.tenant', true), '-') || ' ' || count(*) FROM ";
    let both = async |expected: &str| {
        for table in ["orders", "attachments"] {
            assert_eq!(value(&client, &format!("{zone}{table}")).await, format!("{expected} 10"), "{table}");
        }
    };
    client.batch_execute("SET TIME ZONE 'Asia/Tokyo'").await.expect("sets");
    both("Asia/Tokyo -").await;
    client.batch_execute("SET app.tenant = '7'").await.expect("sets");
    both("Asia/Tokyo 7").await;
    client.batch_execute("BEGIN").await.expect("begins");
    client.batch_execute("SET LOCAL TIME ZONE 'Europe/Rome'").await.expect("sets");
    both("Europe/Rome 7").await;
    client.batch_execute("COMMIT").await.expect("commits");
    both("Asia/Tokyo 7").await;
    client.batch_execute("BEGIN").await.expect("begins");
    both("Asia/Tokyo 7").await;
    client.batch_execute("SET TIME ZONE 'Europe/Rome'").await.expect("sets");
    both("Europe/Rome 7").await;
    client.batch_execute("ROLLBACK").await.expect("rolls back");
    both("Asia/Tokyo 7").await;
    client.batch_execute("DISCARD ALL").await.expect("discards");
    let zone = value(&client, "SHOW timezone").await;
    for table in ["orders", "attachments"] {
        assert_eq!(value(&client, &format!("SELECT current_setting('timezone') FROM {table} LIMIT 1")).await, zone);
    }
}

#[tokio::test]
async fn a_block_is_one_block_whatever_it_is_open_on() {
    let pair = split("new-primary", "").await;
    let client = pair.client().await;
    let (old, new) = (&pair.databases.old, &pair.databases.new);
    let run = async |sql: &str| client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    // All of it on old: one COMMIT there.
    for sql in [
        "BEGIN ISOLATION LEVEL REPEATABLE READ",
        "SAVEPOINT a",
        "UPDATE orders SET note = 'x' WHERE id = 2",
        "ROLLBACK TO a",
    ] {
        run(sql).await;
    }
    assert_eq!(value(&client, "SELECT current_setting('transaction_isolation') FROM orders").await, "repeatable read");
    assert_eq!(value(&client, "SELECT note FROM orders WHERE id = 2").await, "o2");
    for sql in ["UPDATE orders SET note = 'y' WHERE id = 2", "COMMIT"] {
        run(sql).await;
    }
    assert_eq!(on(old, "SELECT note FROM orders WHERE id = 2").await, "y");
    // Reads of both, a write of one; savepoints hold on both.
    for (write, check) in [("orders", old), ("attachments", new)] {
        run("BEGIN").await;
        assert_eq!(value(&client, "SELECT count(*) FROM attachments").await, "10");
        run("SAVEPOINT a").await;
        assert_eq!(value(&client, "SELECT count(*) FROM orders").await, "10");
        run(&format!("UPDATE {write} SET amount = 1 WHERE id = 3")).await;
        run("ROLLBACK TO a").await;
        assert_eq!(value(&client, &format!("SELECT amount FROM {write} WHERE id = 3")).await, "100");
        run(&format!("UPDATE {write} SET amount = 2 WHERE id = 3")).await;
        run("RELEASE a").await;
        assert_eq!(value(&client, "SELECT 1").await, "1");
        run("COMMIT").await;
        assert_eq!(on(check, &format!("SELECT amount FROM {write} WHERE id = 3")).await, "2");
    }
    // An error on one side fails the block on both; ROLLBACK TO mends both; ROLLBACK undoes both.
    run("BEGIN").await;
    run("UPDATE attachments SET amount = 7 WHERE id = 4").await;
    run("SAVEPOINT b").await;
    run("UPDATE orders SET amount = 7 WHERE id = 4").await;
    assert_eq!(refusal(&client, "SELECT 1 / (id - 4) FROM orders ORDER BY id").await, "22012");
    for sql in [
        "SELECT count(*) FROM attachments",
        "SELECT count(*) FROM orders",
        "SELECT 1",
        "SELECT 1 FROM orders, attachments",
    ] {
        assert_eq!(refusal(&client, sql).await, "25P02", "{sql}");
    }
    run("ROLLBACK TO b").await;
    assert_eq!(value(&client, "SELECT amount FROM orders WHERE id = 4").await, "100");
    assert_eq!(value(&client, "SELECT amount FROM attachments WHERE id = 4").await, "7");
    assert_eq!(refusal(&client, "SELECT 1 / 0").await, "22012");
    assert_eq!(refusal(&client, "SELECT count(*) FROM orders").await, "25P02");
    run("ROLLBACK").await;
    assert_eq!(value(&client, "SELECT amount FROM attachments WHERE id = 4").await, "100");
    // COMMIT of a failed block says ROLLBACK, and the session is whole.
    run("BEGIN").await;
    run("UPDATE orders SET amount = 9 WHERE id = 5").await;
    assert_eq!(value(&client, "SELECT count(*) FROM attachments").await, "10");
    assert_eq!(refusal(&client, "SELECT nothing FROM attachments").await, "42703");
    run("COMMIT").await;
    assert_eq!(value(&client, "SELECT amount FROM orders WHERE id = 5").await, "100");
    pair.proxy.settle().await;
    assert_eq!(
        on(old, "SELECT sum(amount) FROM attachments").await,
        on(new, "SELECT sum(amount) FROM attachments").await
    );
}

async fn a_driver_sends_begin_in_the_pipeline_of_what_follows(pair: &Pair) {
    let mut client = pair.client().await;
    let old = &pair.databases.old;
    for (end, amount) in [(true, "5"), (false, "5")] {
        let transaction = client.transaction().await.expect("begins");
        let added = if end { 5_i64 } else { 6 };
        transaction.execute("UPDATE orders SET amount = $1 WHERE id = 6", &[&added]).await.expect("old");
        let found = transaction.query_one("SELECT amount FROM attachments WHERE id = $1", &[&6]).await.expect("new");
        assert_eq!(found.get::<_, i64>(0), 100);
        let point = transaction.prepare("SELECT amount FROM orders WHERE id = 6").await.expect("prepares");
        assert_eq!(transaction.query_one(&point, &[]).await.expect("old").get::<_, i64>(0), added);
        if end {
            transaction.commit().await.expect("commits")
        } else {
            transaction.rollback().await.expect("rolls back")
        }
        assert_eq!(on(old, "SELECT amount FROM orders WHERE id = 6").await, amount);
    }
}

async fn a_session_on_old_that_was_ended_comes_back(pair: &Pair) {
    let client = pair.client().await;
    let orders = client.prepare("SELECT count(*) FROM orders").await.expect("prepares");
    assert_eq!(client.query_one(&orders, &[]).await.expect("reads").get::<_, i64>(0), 10);
    let end = "SELECT count(pg_terminate_backend(pid)) > 0 FROM pg_stat_activity WHERE usename = 'app'";
    assert_eq!(on(&pair.databases.old, end).await, "t");
    let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    crate::common::until("it has ended", async || on(&pair.databases.old, left).await == "0").await;
    assert_eq!(client.query_one(&orders, &[]).await.expect("reads again").get::<_, i64>(0), 10);
    // A CancelRequest reaches the server that is at work.
    let cancel = client.cancel_token();
    let (slow, _) = tokio::join!(client.simple_query("SELECT pg_sleep(30) FROM orders LIMIT 1"), async {
        crate::common::until("it sleeps", async || {
            on(&pair.databases.old, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").await == "1"
        })
        .await;
        cancel.cancel_query(tokio_postgres::NoTls).await.expect("cancels");
    });
    assert_eq!(slow.expect_err("cancelled").code(), Some(&SqlState::QUERY_CANCELED));
    assert_eq!(value(&client, "SELECT count(*) FROM attachments").await, "10");
}
