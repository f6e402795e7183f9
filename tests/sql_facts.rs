//! What facts say of each form of statement.

use crossfade::sql::facts::{Facts, Merges, Name, OnConflict, Verb};
use crossfade::sql::{self, Limits};

fn read(text: &str) -> Facts {
    sql::read(text.as_bytes(), Limits::default())
}

fn show(name: &Name) -> String {
    name.schema.iter().chain([&name.name]).cloned().collect::<Vec<_>>().join(".")
}

fn shown(names: &[Name]) -> String {
    names.iter().map(show).collect::<Vec<_>>().join(" ")
}

/// `table row assigned,assigned; ...`
fn targets(facts: &Facts) -> String {
    let one = |target: &sql::facts::Target| {
        format!("{} {} {}", show(&target.table), target.row, target.assigned.join(",")).trim_end().to_owned()
    };
    facts.targets.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn name(name: &str) -> String {
    name.to_owned()
}

#[test]
fn utility_statements_are_told_by_their_keywords() {
    let begin = |read_only: Option<bool>| Verb::Begin { read_only, bare: read_only.is_none() };
    let ddl = |temporary| Verb::Ddl { temporary };
    let set = |parameter: &str, local| Verb::Set { name: name(parameter), local };
    for (text, verb) in [
        ("", Verb::Empty),
        (" ; -- x", Verb::Empty),
        ("BEGIN", begin(None)),
        ("begin work;", begin(None)),
        ("start transaction isolation level repeatable read, read only, deferrable", begin(Some(true))),
        ("begin transaction read only read write not deferrable", begin(Some(false))),
        ("begin isolation level serializable", Verb::Begin { read_only: None, bare: false }),
        ("start transaction", Verb::Begin { read_only: None, bare: false }),
        ("begin nonsense", Verb::Other),
        ("start", Verb::Other),
        ("begin read only,", Verb::Other),
        ("commit", Verb::Commit { chain: false }),
        ("END TRANSACTION AND CHAIN", Verb::Commit { chain: true }),
        ("commit work and no chain", Verb::Commit { chain: false }),
        ("commit and", Verb::Other),
        ("rollback", Verb::Rollback { chain: false }),
        ("abort and chain", Verb::Rollback { chain: true }),
        ("savepoint \"A b\"", Verb::Savepoint(name("A b"))),
        ("savepoint", Verb::Other),
        ("release savepoint Sp", Verb::Release(name("sp"))),
        ("release savepoint", Verb::Release(name("savepoint"))),
        ("rollback to sp", Verb::RollbackTo(name("sp"))),
        ("rollback work to savepoint SP", Verb::RollbackTo(name("sp"))),
        ("abort to sp", Verb::Other),
        ("prepare transaction 'x'", Verb::PrepareTransaction),
        ("commit prepared 'x'", Verb::CommitPrepared),
        ("rollback prepared 'x'", Verb::RollbackPrepared),
        ("commit prepared x", Verb::Other),
        ("set Search_Path to a, b", set("search_path", false)),
        ("set local my.\"Setting\" = 'x'", set("my.setting", true)),
        ("set session datestyle = iso", set("datestyle", false)),
        ("set role none", set("role", false)),
        ("set local role x", set("role", true)),
        ("set session authorization default", set("session_authorization", false)),
        ("set local session authorization x", set("session_authorization", true)),
        ("set time zone 'UTC'", set("timezone", false)),
        ("set local time zone local", set("timezone", true)),
        ("set names 'latin1'", set("client_encoding", false)),
        ("set schema 'x'", set("search_path", false)),
        ("set xml option document", set("xmloption", false)),
        ("set session.foo = 1", set("session.foo", false)),
        ("set transaction read only", Verb::SetTransaction),
        ("set local transaction isolation level serializable", Verb::SetTransaction),
        ("set session characteristics as transaction read write", Verb::SetTransaction),
        ("set constraints all deferred", Verb::SetTransaction),
        ("set nonsense", Verb::Other),
        ("reset all", Verb::Reset(None)),
        ("reset my.Setting", Verb::Reset(Some(name("my.setting")))),
        ("reset session authorization", Verb::Reset(Some(name("session_authorization")))),
        ("reset time zone", Verb::Reset(Some(name("timezone")))),
        ("show custom.x", Verb::Show),
        ("discard all", Verb::Discard(name("all"))),
        ("discard temporary", Verb::Discard(name("temp"))),
        ("discard x", Verb::Other),
        ("execute p(1, f(2))", Verb::Execute(name("p"))),
        ("deallocate prepare p", Verb::Deallocate(Some(name("p")))),
        ("deallocate prepare", Verb::Deallocate(Some(name("prepare")))),
        ("deallocate all", Verb::Deallocate(None)),
        ("fetch forward 10 from c", Verb::Cursor),
        ("close all", Verb::Cursor),
        ("move next in c", Verb::Cursor),
        ("listen x", Verb::Notify),
        ("notify x, 'y'", Verb::Notify),
        ("unlisten *", Verb::Notify),
        ("call p(1)", Verb::Call),
        ("do $$ begin; end $$", Verb::Do),
        ("vacuum (full) t", Verb::Maintenance),
        ("analyze", Verb::Maintenance),
        ("create table t (a int)", ddl(false)),
        ("create temp table t (a int)", ddl(true)),
        ("create or replace local temporary view v as select 1", ddl(true)),
        ("create unlogged table t as select 1", ddl(false)),
        ("alter table temp add a int", ddl(false)),
        ("refresh materialized view v", ddl(false)),
        ("reindex table t", ddl(false)),
        ("select 1 into t", ddl(false)),
        ("select a into temp t from b union select 2", ddl(true)),
        ("with x as (select 1) select * into temporary table t from x", ddl(true)),
        ("nonsense", Verb::Other),
        ("select 1; select 2", Verb::Other),
        ("select 'x", Verb::Other),
        ("select /* x", Verb::Other),
    ] {
        assert_eq!(read(text).verb, verb, "{text}");
    }
}

#[test]
fn targets_say_how_returning_may_refer_to_their_row() {
    for (text, expected) in [
        ("insert into t values (1)", "t t"),
        ("insert into A.\"T x\" as \"Y\" (b) values (1)", "a.T x \"Y\""),
        ("insert into db.s.t default values", "s.t t"),
        ("insert into t as User_x select 1, 2 on conflict do nothing", "t user_x"),
        ("insert into t (a, b) values (1, 2) on conflict (lower(a)) do update set b = excluded.b, a[1] = 2", "t t a,b"),
        ("update t set b = 1, a = default", "t t a,b"),
        ("update only s.t as x set (c, b) = (select 1, 2), a.f = 3 where current of k", "s.t x a,b,c"),
        ("update only (t) x set a[1:2] = '{}'", "t x a"),
        ("update t * set \"A\" = 1 from u where t.id = u.id", "t t A"),
        ("update \"user\" set a = 1", "user \"user\" a"),
        ("delete from a.b", "a.b b"),
        ("delete from only t x using u where x.a = u.a returning *", "t x"),
        (
            "merge into t as x using s on x.a = s.a when matched and s.d then delete \
             when matched then update set b = s.b, a = 1 when not matched then insert (c) values (1)",
            "t x a,b",
        ),
        (
            "with w as (update u as z set a = 1 returning *), v as (delete from x) insert into t select * from w",
            "t t; u z a; x x",
        ),
        ("truncate a, only b.c, d * restart identity cascade", "a a; b.c c; d d"),
        ("copy s.t (a, \"B\") from stdin with (format csv)", "s.t t"),
        ("insert into U&\"d\\0061t\" values (1)", "dat dat"),
    ] {
        assert_eq!(targets(&read(text)), expected, "{text}");
    }
}

#[test]
fn reads_leave_out_ctes_where_they_hold_and_nowhere_else() {
    for (text, expected) in [
        ("select * from a, s.b x join c using (d), lateral (select * from e) f", "a c e s.b"),
        ("with a as (select * from b) select * from a, s.a", "b s.a"),
        ("with a as (select * from a) select * from a", "a"),
        ("with recursive a as (select 1 union select * from a) select * from a", ""),
        ("with a as (select 1), b as (select * from a) select * from b", ""),
        ("with b as (select * from a), a as (select 1) select * from b", "a"),
        ("select (with a as (select 1) select count(*) from a) from a", "a"),
        ("with a as (select 1) select * from a union select * from a union all (select * from a)", ""),
        ("(with a as (select 1) select * from a) union select * from a", "a"),
        ("with t as (select 1) insert into t select * from t", ""),
        ("insert into t with x as (select * from y) select * from x", "y"),
        ("insert into t values ((select max(a) from u))", "u"),
        ("update t set a = u.a from u where exists (select from v)", "u v"),
        ("delete from t using a join b on true where t.x in (table c)", "a b c"),
        ("merge into t using (select * from u) s on true when matched then update set a = (select 1 from v)", "u v"),
        ("update t set a = 1 from t as other", "t"),
        ("select * from only a, only (s.b) join only \"C\" on true", "C a s.b"),
        ("select a only from b", "b"),
        ("select * from current_date", ""),
        ("select * from \"user\"", "user"),
        ("select * from rows from (f(1), g(2)) x, unnest(array[1]), h() with ordinality", ""),
        ("select * from a tablesample system (10)", "a"),
        ("values ((select 1 from a))", "a"),
        ("table \"A\"", "A"),
        ("lock table a, only b in share mode", "a b"),
        ("copy a to stdout", "a"),
        ("copy (select * from a, b) to stdout", "a b"),
        ("explain (costs off) select * from a", "a"),
        ("declare c no scroll cursor with hold for select * from a", "a"),
    ] {
        assert_eq!(shown(&read(text).reads), expected, "{text}");
    }
}

#[test]
fn functions_are_found_wherever_they_are_called() {
    for (text, expected) in [
        ("select F(1), s.g(2, h(3)), \"I\"(4)", "I f h s.g"),
        (
            "select f(variadic array[1]), g(distinct a order by h(a)) filter (where i(a)) over (partition by j(b))",
            "f g h i j",
        ),
        ("select * from f(1) a, lateral g(2) b, rows from (h(1), i(2)), s.j()", "f g h i s.j"),
        (
            "with a as (select f()) select (select g() from a) where h() order by i() limit j() offset k()",
            "f g h i j k",
        ),
        ("insert into t values (1, nextval('s')), (2, f())", "f nextval"),
        (
            "insert into t values (1) on conflict (lower(a)) do update set b = f() where g() returning h()",
            "f g h lower",
        ),
        ("update t set (a, b) = (f(), g()) where h()", "f g h"),
        (
            "merge into t using f() on g() when matched and h() then update set a = i() when not matched then insert values (j())",
            "f g h i j",
        ),
        ("select coalesce(a, nullif(f(), greatest(1, 2)))", "f"),
        (
            "select extract(epoch from a), substring(a from 2), substring(b, 2), trim(leading from c)",
            "substring pg_catalog.extract pg_catalog.ltrim pg_catalog.substring",
        ),
        (
            "select case when f() then g() else h() end, array[i()], (j()).x, (k(1))[2], cast(l() as int), m()::text",
            "f g h i j k l m",
        ),
        (
            "select a between f() and g(), a in (h()), a like i() escape j(), not k(), a is distinct from l()",
            "f g h i j k l",
        ),
        ("select current_user, current_timestamp(3), localtime", ""),
        ("create temp table t as select f() from g()", "f g"),
        ("copy (select f()) to stdout", "f"),
        ("copy t from stdin where f(a)", "f"),
        ("execute p(f(1))", "f"),
        ("call s.p(f(1))", "f s.p"),
        ("explain analyze select f()", "f"),
        ("select from t window w as (partition by f())", "f"),
        ("select pg_catalog.set_config('a', 'b', true)", "pg_catalog.set_config"),
    ] {
        assert_eq!(shown(&read(text).functions), expected, "{text}");
    }
}

#[test]
fn statements_inside_others_have_facts_of_their_own() {
    for (text, verb, inner_text, inner_verb) in [
        ("explain select 1", Verb::Explain { analyze: false }, "select 1", Verb::Select),
        (
            "explain analyze verbose update t set a = 1;",
            Verb::Explain { analyze: true },
            "update t set a = 1",
            Verb::Update,
        ),
        ("explain (buffers, analyze) delete from t", Verb::Explain { analyze: true }, "delete from t", Verb::Delete),
        (
            "explain (analyze false, verbose) delete from t",
            Verb::Explain { analyze: false },
            "delete from t",
            Verb::Delete,
        ),
        ("explain (analyze 0) delete from t", Verb::Explain { analyze: true }, "delete from t", Verb::Delete),
        ("explain (select 1)", Verb::Explain { analyze: false }, "(select 1)", Verb::Select),
        ("explain analyze execute p", Verb::Explain { analyze: true }, "execute p", Verb::Execute(name("p"))),
        (
            "explain analyze create table t as select 1",
            Verb::Explain { analyze: true },
            "create table t as select 1",
            Verb::Ddl { temporary: false },
        ),
        (
            "prepare p (int, text) as insert into t values ($1)",
            Verb::Prepare(name("p")),
            "insert into t values ($1)",
            Verb::Insert,
        ),
        (
            "declare C binary cursor for select 1 for update",
            Verb::Declare { name: name("c"), hold: false },
            "select 1 for update",
            Verb::Select,
        ),
        ("copy (select 1) to stdout", Verb::CopyTo, "select 1", Verb::Select),
        ("copy (delete from t returning *) to stdout", Verb::Other, "delete from t returning *", Verb::Delete),
    ] {
        let facts = read(text);
        assert_eq!(facts.verb, verb, "{text}");
        let (range, inner) = *facts.inner.unwrap();
        assert_eq!((&text[range], inner.verb), (inner_text, inner_verb), "{text}");
    }
    assert_eq!(targets(&read("copy (delete from t returning *) to stdout")), "t t");
}

#[test]
fn merge_says_what_its_actions_do() {
    let merges = |insert, update, delete| Merges { insert, update, delete };
    for (text, expected) in [
        ("merge into t using s on a = b when matched then do nothing", merges(false, false, false)),
        (
            "merge into t using s on a = b when matched and c then delete when not matched then insert values (1)",
            merges(true, false, true),
        ),
        (
            "merge into t using s on a = b when not matched by source then update set c = default returning merge_action(), *",
            merges(false, true, false),
        ),
        (
            "merge into only t as x using s on a = b when not matched by target then insert default values",
            merges(true, false, false),
        ),
        (
            "with s as (select 1 as b) merge into t using s on a = b when matched then update set (c, d) = (1, 2) when matched then delete",
            merges(false, true, true),
        ),
        // Those of another one, in WITH, are its own.
        (
            "with m as (merge into u using s on true when matched then delete returning 1) select * from m",
            merges(false, false, false),
        ),
        (
            "with m as (merge into u using s on true when matched then delete returning 1) merge into t using m on true when not matched then insert values (1)",
            merges(true, false, false),
        ),
        ("delete from t", merges(false, false, false)),
    ] {
        assert_eq!(read(text).merges, expected, "{text}");
    }
    let facts = read("merge into t using s on true when matched then delete returning 1");
    assert!(facts.returning && facts.verb == Verb::Merge);
}

#[test]
fn flags_columns_parameters_and_end() {
    let facts =
        read("insert into t (a, \"B\", c[1]) values ($2, $10, '$99') on conflict do nothing returning a ; -- x");
    assert_eq!(facts.columns, Some(vec![name("a"), name("B"), name("c")]));
    assert_eq!((facts.parameters, facts.returning, facts.on_conflict), (10, true, Some(OnConflict::Nothing)));
    assert_eq!(facts.end, 87);
    assert_eq!(read("insert into t select 1").columns, None);
    assert_eq!(read("merge into t using s on true when not matched then insert (a) values (1)").columns, None);
    assert_eq!(read("copy t (a) from '/x'").columns, Some(vec![name("a")]));
    assert_eq!(
        read("insert into t values (1) on conflict (a) where b do update set c = 1").on_conflict,
        Some(OnConflict::Update)
    );
    let upsert = |clause: &str| read(&format!("insert into t as x values (1) on conflict {clause}"));
    let set = |clause: &str| upsert(&format!("(a) do update set {clause}")).set_to_excluded;
    assert_eq!(upsert("(\"B\", a) do nothing").conflict_columns, ["B", "a"]);
    for other in ["(a collate \"C\")", "(a int4_ops)", "((a))", "(a, (b + 1))", "(a) where b", "on constraint a", ""] {
        assert_eq!(upsert(&format!("{other} do nothing")).conflict_columns, [""; 0], "{other}");
    }
    assert_eq!(set("A = Excluded.a, b = excluded . \"b\", c = excluded.a, d = x.d, e = excluded.e + 1"), ["a", "b"]);
    assert_eq!(set("(a, b) = (excluded.a, excluded.b)"), [""; 0]);
    assert_eq!(set("a = (select excluded.a)"), [""; 0]);
    assert_eq!(set("a = \"EXCLUDED\".a"), [""; 0]);
    assert_eq!(read("update t set a = excluded.a from excluded").set_to_excluded, [""; 0]);
    assert!(!read("with x as (delete from u returning *) insert into t select * from x").returning);
    for lock in ["update", "no key update of a nowait", "share skip locked", "key share"] {
        assert!(read(&format!("select * from a for {lock}")).locking, "{lock}");
        assert!(read(&format!("select * from (select * from a for {lock}) b")).locking, "{lock}");
    }
    assert!(!read("select a from b").locking);
    assert!(read("update t set a = 1 where current of c").current_of);
    let facts = read("with x as (insert into t values (1) returning a) select * from x, u");
    assert_eq!((facts.verb, facts.modifying_cte), (Verb::Other, true));
    assert_eq!(shown(&facts.reads), "u");
}

#[test]
fn copy_tells_client_from_server() {
    for (text, verb) in [
        ("copy t from stdin", Verb::CopyFromStdin),
        ("COPY BINARY t FROM STDIN", Verb::CopyFromStdin),
        ("copy t (a) from stdin (format binary) where a > 1", Verb::CopyFromStdin),
        ("copy t from '/tmp/x'", Verb::CopyFromServer),
        ("copy t from program 'cat x' with csv", Verb::CopyFromServer),
        ("copy t to stdout", Verb::CopyTo),
        ("copy t to program 'x'", Verb::CopyTo),
        ("copy t", Verb::Other),
    ] {
        assert_eq!(read(text).verb, verb, "{text}");
    }
    assert_eq!(
        read("truncate t restart identity cascade").verb,
        Verb::Truncate { restart_identity: true, cascade: true }
    );
    assert_eq!(
        read("truncate table t continue identity").verb,
        Verb::Truncate { restart_identity: false, cascade: false }
    );
    assert_eq!(read("truncate t nonsense").verb, Verb::Other);
}

#[test]
fn texts_in_other_encodings_are_read_unless_a_name_needs_them() {
    let facts = sql::read(b"update t set a = 'caf\xe9' -- \xff", Limits::default());
    assert_eq!((facts.verb, facts.end), (Verb::Update, 23));
    let facts = sql::read(b"update caf\xe9 set a = 1", Limits::default());
    assert_eq!((facts.verb.clone(), targets(&facts).as_str()), (Verb::Other, ""));
}

#[test]
fn forms_that_one_parser_alone_cannot_read() {
    for (text, verb) in [
        ("update t set a[1] = 2", Verb::Update),
        ("insert into t overriding system value values (1)", Verb::Insert),
        ("select * from t for no key update skip locked", Verb::Select),
        ("select pg_lsn '0/1', interval(2) '1', 0b101, 'a'\n'b'", Verb::Select),
        ("select a from t fetch first 3 rows with ties", Verb::Select),
        ("select (a).b.c, (f(x)).*, a[1:2][3], :: from t", Verb::Other),
        ("update t set a = default where b ~~* all (select c)", Verb::Update),
        ("select json_table.a from json_table('[]', '$[*]' columns (a int path '$.a'))", Verb::Select),
    ] {
        assert_eq!(read(text).verb, verb, "{text}");
    }
}

#[test]
fn facts_move_to_another_statement_of_the_same_shape() {
    for (one, other) in [
        ("update t set a = 1 returning b", "update  t set a = 100000 returning b /* x */;"),
        ("explain (analyze 1) update t set a = 1", "  explain /* x */ (analyze 1000) update t set a = 1000"),
        ("prepare p as explain analyze select 'x'", "prepare  p as   explain analyze select 'xyz'"),
        ("copy (select 1, 2) to stdout", "/**/copy (select 1000,  2) to stdout"),
        ("declare c cursor for select 1", "declare c  cursor for select 1;"),
    ] {
        assert_eq!(sql::shape(one.as_bytes()).text, sql::shape(other.as_bytes()).text);
        assert_ne!(read(one), read(other), "{one}");
        assert_eq!(sql::place(&read(one), other.as_bytes()), read(other), "{other}");
        assert_eq!(sql::place(&read(other), one.as_bytes()), read(one), "{one}");
    }
}

#[test]
fn of_what_is_no_one_statement_no_target_is_believed() {
    assert_eq!(targets(&read("update t set a = 1; delete from u")), "");
    assert_eq!(targets(&read("update t set a = 'x")), "");
    assert_eq!(targets(&read("with x as (select 1) update t set nonsense")), "");
    assert_eq!(targets(&read("update s.t set nonsense")), "s.t t");
}
