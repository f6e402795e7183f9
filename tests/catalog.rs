//! The catalog of two real databases, and the plans that follow from it.

mod catalog_support;

use catalog_support::Server;
use crossfade::catalog::{self, Catalog, Layout, Resolution, Table};
use crossfade::config::TableRule;
use crossfade::phase::Side;
use crossfade::plan::{self, Audited, Plan};
use crossfade::sql::facts::{Facts, Name, OnConflict, Target, Verb};
use tokio_postgres::Client;

const SHOP: &str = r#"
CREATE SCHEMA parts; CREATE SCHEMA other;
CREATE EXTENSION citext; CREATE EXTENSION moddatetime;
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE ROLE writer; CREATE ROLE columns_only; CREATE ROLE reader;
CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text NOT NULL UNIQUE, updated_at timestamptz);
CREATE TABLE photos (id int PRIMARY KEY, owner bigint REFERENCES users ON DELETE CASCADE ON UPDATE CASCADE, path text, t int GENERATED ALWAYS AS (id + 1) STORED);
CREATE TABLE by_email (email text REFERENCES users (email) ON UPDATE CASCADE, note text);
CREATE TABLE history (at timestamptz, what text);
CREATE TABLE unique_only (b uuid NOT NULL, a numeric NOT NULL, c text, UNIQUE (a, b));
CREATE TABLE nullable (a int UNIQUE, b int);
CREATE UNIQUE INDEX nullable_b ON nullable (b) WHERE b > 0;
CREATE TABLE typed (m mood PRIMARY KEY, p regproc);
CREATE TABLE late (id int PRIMARY KEY DEFERRABLE);
CREATE TABLE secured (id int PRIMARY KEY); ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
CREATE TABLE ruled (id int PRIMARY KEY); CREATE RULE nothing AS ON DELETE TO ruled DO INSTEAD NOTHING;
CREATE TABLE events (id int, region text, n int, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE parts.events_a PARTITION OF events FOR VALUES IN ('a');
CREATE TABLE parts.events_b PARTITION OF events FOR VALUES IN ('b') PARTITION BY RANGE (id);
CREATE TABLE parts.events_b1 PARTITION OF parts.events_b FOR VALUES FROM (0) TO (10);
CREATE TABLE animals (id int PRIMARY KEY); CREATE TABLE cats (lives int, PRIMARY KEY (id)) INHERITS (animals);
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;
CREATE FUNCTION rekey() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.id := NEW.id + 1; RETURN NEW; END $$;
CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO history VALUES (now(), 'x'); RETURN NULL; END $$;
CREATE TRIGGER touch BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TABLE rekeyed (id int PRIMARY KEY, n int);
CREATE TRIGGER rekey BEFORE UPDATE ON rekeyed FOR EACH ROW EXECUTE FUNCTION rekey();
CREATE TABLE logged (id int PRIMARY KEY, n int);
CREATE TRIGGER log AFTER INSERT OR DELETE ON logged FOR EACH ROW EXECUTE FUNCTION log();
CREATE TRIGGER log_truncate AFTER TRUNCATE ON logged EXECUTE FUNCTION log();
CREATE TABLE quiet (id int PRIMARY KEY, at timestamptz);
CREATE TRIGGER disabled AFTER INSERT ON quiet FOR EACH ROW EXECUTE FUNCTION log();
ALTER TABLE quiet DISABLE TRIGGER disabled;
CREATE TRIGGER stamp BEFORE UPDATE ON quiet FOR EACH ROW EXECUTE FUNCTION moddatetime(at);
CREATE FUNCTION make() RETURNS int LANGUAGE plpgsql AS $$ BEGIN INSERT INTO history VALUES (now(), 'made'); RETURN 1; END $$;
CREATE FUNCTION through() RETURNS int LANGUAGE sql STABLE AS 'SELECT make()';
CREATE FUNCTION pure(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1';
CREATE TABLE defaulted (id int PRIMARY KEY DEFAULT make(), n int);
CREATE VIEW photo_paths AS SELECT id, path FROM photos;
CREATE VIEW making AS SELECT through() AS n;
CREATE VIEW over_making AS SELECT * FROM making, photo_paths;
CREATE MATERIALIZED VIEW kept AS SELECT 1 AS n;
CREATE TABLE other.photos (id int PRIMARY KEY, different text);
CREATE TABLE same_name (id int PRIMARY KEY); CREATE TABLE other.same_name (id int PRIMARY KEY);
GRANT INSERT, UPDATE, DELETE ON photos TO writer; GRANT ALL ON photos TO reader;
GRANT SELECT (id), INSERT (id) ON photos TO columns_only;
"#;

const OLD: &str = "CREATE TABLE only_old (id int PRIMARY KEY); CREATE TABLE fewer (id int PRIMARY KEY, a int, b int);
    CREATE TABLE wider (id int PRIMARY KEY, v varchar(10)); CREATE TABLE other_key (a int PRIMARY KEY, b int NOT NULL);
    CREATE TABLE staying (id int PRIMARY KEY, owner bigint); CREATE TRIGGER log AFTER INSERT ON staying FOR EACH ROW EXECUTE FUNCTION log();
    CREATE TABLE parent (id int PRIMARY KEY);";

const NEW: &str = "CREATE TABLE only_new (id int PRIMARY KEY); CREATE TABLE fewer (id int PRIMARY KEY, a int);
    CREATE TABLE wider (id int PRIMARY KEY, v varchar(20)); CREATE TABLE other_key (a int NOT NULL, b int PRIMARY KEY)";

async fn shop(server: &Server, installed: bool) -> (Client, Client) {
    let (old, new) = server.pair(installed).await;
    old.batch_execute("CREATE TYPE dummy AS ENUM ('x')").await.unwrap();
    old.batch_execute(SHOP).await.unwrap();
    // Roles belong to the cluster, not to a database.
    let shared: bool = new.query_one("SELECT to_regrole('writer') IS NOT NULL", &[]).await.unwrap().get(0);
    let roles = "CREATE ROLE writer; CREATE ROLE columns_only; CREATE ROLE reader;";
    assert!(SHOP.contains(roles));
    new.batch_execute(&if shared { SHOP.replace(roles, "") } else { SHOP.to_owned() }).await.unwrap();
    old.batch_execute(OLD).await.unwrap();
    old.batch_execute("CREATE TABLE child (parent int REFERENCES parent, id int PRIMARY KEY)").await.unwrap();
    new.batch_execute("CREATE TABLE child (parent int, id int PRIMARY KEY)").await.unwrap();
    new.batch_execute(NEW).await.unwrap();
    (old, new)
}

fn named<'a>(catalog: &'a Catalog, label: &str) -> &'a Table {
    let found = catalog.tables.values().find(|table| table.label() == label);
    found.unwrap_or_else(|| panic!("{label} migrates"))
}

fn key(table: &Table) -> Vec<&str> {
    table.key.iter().flat_map(|key| &key.columns).map(|&at| table.columns[at].name.old.as_str()).collect()
}

#[tokio::test]
async fn definitions_of_both_sides_are_paired() {
    let server = Server::start().await;
    let (old, new) = shop(&server, true).await;
    let catalog = catalog::load(&old, &new, None, &["public.nullable".into()]).await.unwrap();
    assert_eq!(catalog.one_sided.old, ["public.only_old", "public.parent", "public.staying"]);
    assert_eq!(catalog.one_sided.new, ["public.only_new"]);
    assert!(catalog.tables.values().all(|table| table.label() != "public.nullable"));
    assert!(catalog.tables.values().all(|table| !table.label().starts_with("parts.")), "partitions go with their root");
    let opaque = |label: &str| named(&catalog, label).opaque.clone().unwrap_or_default();
    assert_eq!(opaque("public.fewer"), "column b is missing on new");
    assert_eq!(opaque("public.wider"), "column v is character varying(10) on old and character varying(20) on new");
    assert_eq!(opaque("public.other_key"), "its key (a) on old is no key on new");
    assert!(opaque("public.typed").starts_with("column p: values of type regproc are OIDs"));
    assert_eq!(opaque("public.animals"), "other tables inherit from it on old");
    assert_eq!(catalog.heirs[&named(&catalog, "public.animals").number], [named(&catalog, "public.cats").number]);
    for (label, columns, bytewise) in [
        ("public.users", vec!["id"], true),
        ("public.unique_only", vec!["a", "b"], false),
        ("public.history", vec![], false),
        ("public.events", vec!["region", "id"], true),
        ("public.typed", vec!["m"], true),
    ] {
        let table = named(&catalog, label);
        assert_eq!(key(table), columns, "{label}");
        assert_eq!(table.key.as_ref().is_some_and(|key| key.bytewise), bytewise, "{label}");
    }
    let late = named(&catalog, "public.late").key.clone().unwrap();
    assert!(late.deferrable.old && late.deferrable.new);
    let photos = named(&catalog, "public.photos");
    assert!(photos.columns[3].generated.old && !photos.columns[0].generated.old);
    assert!(named(&catalog, "public.users").columns[0].identity_always.new);
    let mood = &named(&catalog, "public.typed").columns[0].kind;
    assert_eq!(mood.layout, Layout::Text);
    assert_ne!(mood.oid.old, mood.oid.new);
}

#[tokio::test]
async fn side_effects_names_and_privileges_are_known() {
    let server = Server::start().await;
    let (old, new) = shop(&server, true).await;
    let catalog = catalog::load(&old, &new, None, &[]).await.unwrap();
    let effects = |label: &str| {
        let found = &named(&catalog, label).effects.old;
        (found.insert, found.update, found.delete, found.before_row)
    };
    // by_email cascades from a column that is not the key; touch cannot change the key.
    assert_eq!(effects("public.users"), (false, true, true, false));
    assert_eq!(effects("public.photos"), (false, false, false, false));
    assert_eq!(effects("public.rekeyed"), (false, false, false, true));
    assert_eq!(effects("public.logged"), (true, false, true, false));
    assert_eq!(effects("public.quiet"), (false, false, false, false));
    assert_eq!(effects("public.defaulted"), (true, true, false, false));
    assert!(named(&catalog, "public.logged").effects.old.truncate);
    assert!(named(&catalog, "public.secured").row_security.old);
    assert!(named(&catalog, "public.ruled").rules.new);
    let numbers = |labels: &[&str]| {
        let mut found: Vec<u32> = labels.iter().map(|label| named(&catalog, label).number).collect();
        found.sort();
        found
    };
    let mut reached = named(&catalog, "public.users").truncate_cascade.old.clone();
    reached.sort();
    assert_eq!(reached, numbers(&["public.photos", "public.by_email"]));
    let events = named(&catalog, "public.events");
    assert_eq!(events.partitions.old.len(), 3);
    let resolve = |schema: Option<&str>, name: &str| {
        let name = Name { schema: schema.map(str::to_owned), name: name.to_owned() };
        match catalog.resolve(Side::Old, &name) {
            Resolution::Tables(tables) => {
                let mut labels: Vec<String> = tables.iter().map(|table| table.label()).collect();
                labels.sort();
                labels.join(" ")
            }
            Resolution::View { writes, .. } => format!("view {writes}"),
            Resolution::Other => "other".into(),
        }
    };
    assert_eq!(resolve(None, "photos"), "other.photos public.photos");
    assert_eq!(resolve(Some("other"), "photos"), "other.photos");
    assert_eq!(resolve(Some("parts"), "events_b1"), "public.events");
    assert_eq!(resolve(None, "events_a"), "public.events");
    assert_eq!(resolve(None, "photo_paths"), "view false");
    assert_eq!(resolve(None, "making"), "view true");
    assert_eq!(resolve(None, "over_making"), "view true");
    assert_eq!(resolve(None, "kept"), "view false");
    assert_eq!(resolve(None, "staying"), "other");
    assert_eq!(resolve(Some("pg_catalog"), "pg_class"), "other");
    let writing = &catalog.writing_functions.old;
    for (name, writes) in
        [("make", true), ("through", true), ("pure", false), ("citext_eq", false), ("moddatetime", false)]
    {
        assert!(catalog.functions.old.contains(name), "{name}");
        assert_eq!(writing.contains(name), writes, "{name}");
    }
    let photos = named(&catalog, "public.photos").number;
    let refused = |role: &str| catalog.no_select.old.contains(&(role.to_owned(), photos));
    assert!(refused("writer") && refused("columns_only") && !refused("reader"));
    assert!(catalog.triggered.old.contains("staying") && !catalog.triggered.old.contains("only_old"));
    assert!(catalog.truncate_reaches.old.contains("parent") && !catalog.truncate_reaches.old.contains("staying"));
    assert_eq!((catalog.encoding.old.as_str(), catalog.encoding.new.as_str()), ("UTF8", "UTF8"));
    assert_eq!(catalog.by_oid.old.values().filter(|table| table.label() == "public.events").count(), 4);
}

#[tokio::test]
async fn numbers_are_the_same_on_both_sides_and_for_ever() {
    let server = Server::start().await;
    let (old, new) = shop(&server, true).await;
    let numbers = |catalog: &Catalog| {
        let mut found: Vec<(String, u32)> =
            catalog.tables.values().map(|table| (table.label(), table.number)).collect();
        found.sort();
        found
    };
    let stored = async |client: &Client| -> Vec<(String, i32)> {
        let query = "SELECT old_schema || '.' || old_name, number FROM crossfade.tables ORDER BY 1";
        client.query(query, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let rules: Vec<TableRule> = ["photos", "public.users"]
        .iter()
        .map(|name| TableRule { name: (*name).to_owned(), ..TableRule::default() })
        .collect();
    let few = catalog::load(&old, &new, Some(&rules), &[]).await.unwrap();
    assert_eq!(numbers(&few), [("public.photos".into(), 1), ("public.users".into(), 2)]);
    let (first, second) = futures_util::join!(catalog::load(&old, &new, None, &[]), async {
        let (old, new) = (server.client("old").await, server.client("new").await);
        catalog::load(&old, &new, None, &[]).await
    });
    let all = first.unwrap();
    assert_eq!(numbers(&all), numbers(&second.unwrap()));
    assert_eq!((named(&all, "public.photos").number, named(&all, "public.users").number), (1, 2));
    assert_eq!(stored(&old).await, stored(&new).await);
    assert_eq!(stored(&old).await.len(), all.tables.len());
    // A side that was made anew gets them back; a table that is gone keeps its number for ever.
    new.batch_execute("TRUNCATE crossfade.tables").await.unwrap();
    old.batch_execute("DROP TABLE quiet; CREATE TABLE another (id int)").await.unwrap();
    new.batch_execute("DROP TABLE quiet; CREATE TABLE another (id int)").await.unwrap();
    let after = catalog::load(&old, &new, None, &[]).await.unwrap();
    assert_eq!(named(&after, "public.another").number as usize, all.tables.len() + 1);
    assert_eq!(stored(&old).await, stored(&new).await);
    new.batch_execute("UPDATE crossfade.tables SET number = 1000 WHERE old_schema = 'public' AND old_name = 'photos'")
        .await
        .unwrap();
    let error = catalog::load(&old, &new, None, &[]).await.unwrap_err();
    assert!(error.to_string().contains("public.photos"), "{error}");
}

#[tokio::test]
async fn a_side_without_the_schema_is_read_without_a_write() {
    let server = Server::start().await;
    let (old, new) = shop(&server, false).await;
    let catalog = catalog::load(&old, &new, None, &[]).await.unwrap();
    assert!(catalog.tables.len() > 20);
    let made: bool = old.query_one("SELECT to_regnamespace('crossfade') IS NOT NULL", &[]).await.unwrap().get(0);
    assert!(!made);
}

#[tokio::test]
async fn the_fingerprint_changes_with_definitions_and_with_nothing_else() {
    let server = Server::start().await;
    let (old, _new) = shop(&server, true).await;
    let mut last = catalog::fingerprint(&old).await.unwrap();
    let same = [
        "INSERT INTO history VALUES (now(), 'x'); ANALYZE; VACUUM",
        "CREATE TEMP TABLE scratch (id int); SELECT nextval('users_id_seq')",
        "UPDATE crossfade.flush SET n = n + 1",
    ];
    for statement in same {
        for statement in statement.split("; ") {
            old.batch_execute(statement).await.unwrap();
        }
        assert_eq!(catalog::fingerprint(&old).await.unwrap(), last, "{statement}");
    }
    let different = [
        "ALTER TABLE photos ADD COLUMN size int",
        "ALTER TABLE photos RENAME COLUMN size TO bytes",
        "ALTER TABLE photos ALTER COLUMN bytes TYPE bigint",
        "ALTER TABLE photos ALTER COLUMN bytes SET DEFAULT 1",
        "ALTER TABLE photos ALTER COLUMN bytes SET DEFAULT 2",
        "ALTER TABLE photos DROP COLUMN bytes",
        "ALTER TABLE photos RENAME TO pictures",
        "ALTER TABLE quiet ENABLE TRIGGER disabled",
        "CREATE POLICY p ON secured USING (id > 1)",
        "ALTER POLICY p ON secured USING (id > 2)",
        "CREATE OR REPLACE FUNCTION make() RETURNS int LANGUAGE sql AS 'SELECT 2'",
        "CREATE UNIQUE INDEX ON history (what)",
        "CREATE OR REPLACE VIEW making AS SELECT 2 AS n",
        "REVOKE ALL ON pictures FROM writer",
        "ALTER TABLE events DETACH PARTITION parts.events_a",
        "ALTER TABLE by_email DROP CONSTRAINT by_email_email_fkey",
        "CREATE TYPE more AS ENUM ('a')",
        "DROP TABLE ruled",
    ];
    for statement in different {
        old.batch_execute(statement).await.unwrap();
        let now = catalog::fingerprint(&old).await.unwrap();
        assert_ne!(now, last, "{statement}");
        last = now;
    }
}

/// A statement of this kind on `table` (`schema.name` or a bare name), with nothing else to it.
fn facts(verb: Verb, table: &str) -> Facts {
    let name = |text: &str| match text.split_once('.') {
        Some((schema, name)) => Name { schema: Some(schema.into()), name: name.into() },
        None => Name { schema: None, name: text.into() },
    };
    let target = |text: &str| Target { table: name(text), row: name(text).name, assigned: Vec::new() };
    let writes = !matches!(verb, Verb::Select | Verb::CopyTo | Verb::Call | Verb::Do);
    let named = table.split_whitespace();
    Facts {
        verb,
        targets: if writes { named.clone().map(target).collect() } else { Vec::new() },
        reads: if writes { Vec::new() } else { named.map(name).collect() },
        functions: Vec::new(),
        returning: false,
        on_conflict: None,
        conflict_columns: Vec::new(),
        set_to_excluded: Vec::new(),
        merges: crossfade::sql::facts::Merges::default(),
        modifying_cte: false,
        within: Vec::new(),
        locking: false,
        current_of: false,
        columns: None,
        parameters: 0,
        end: 0,
        inner: None,
    }
}

fn assigning(mut facts: Facts, column: &str) -> Facts {
    facts.targets[0].assigned.push(column.into());
    facts
}

fn calling(mut facts: Facts, function: &str) -> Facts {
    facts.functions.push(Name { schema: None, name: function.into() });
    facts
}

fn in_schema(schema: &str, function: &str) -> Facts {
    let name = Name { schema: Some(schema.into()), name: function.into() };
    Facts { functions: vec![name], ..facts(Verb::Select, "") }
}

fn upserting(table: &str, column: &str) -> Facts {
    let facts = assigning(facts(Verb::Insert, table), column);
    Facts { on_conflict: Some(OnConflict::Update), ..facts }
}

fn inside(verb: Verb, inner: Facts) -> Facts {
    Facts { inner: Some(Box::new((0..0, inner))), ..facts(verb, "") }
}

/// A plan in a few words.
fn told(plan: &Plan) -> String {
    let labels = |tables: &[std::sync::Arc<Table>]| {
        let mut labels: Vec<String> = tables.iter().map(|table| format!(" {}", table.label())).collect();
        labels.sort();
        labels.concat()
    };
    match plan {
        Plan::Pass => "pass".into(),
        Plan::Capture(found) => {
            let effect = found.effect.map_or("beside".to_owned(), |effect| format!("{effect:?}"));
            let audited = if found.audited == Audited::No { "" } else { " audited" };
            format!("capture {effect}{}{audited}", labels(&found.tables))
        }
        Plan::Opaque(found) => {
            let flags = [(found.unwrapped, " unwrapped"), (found.ddl, " ddl")];
            let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, word)| *word).collect();
            format!("opaque {}{}{flags}", found.reason, labels(&found.tables))
        }
        Plan::Truncate(tables) => format!("truncate{}", labels(tables)),
        Plan::Copy(copy) => {
            format!("copy {}{}", copy.table.label(), if copy.audited { " audited" } else { "" })
        }
    }
}

#[tokio::test]
async fn each_statement_has_its_plan() {
    use Verb::*;
    let server = Server::start().await;
    let (old, new) = shop(&server, true).await;
    let catalog = catalog::load(&old, &new, None, &[]).await.unwrap();
    let truncate = |tables: &str, cascade: bool| facts(Truncate { restart_identity: false, cascade }, tables);
    let copy = |table: &str, columns: &[&str]| Facts {
        columns: Some(columns.iter().map(|column| (*column).into()).collect()),
        ..facts(CopyFromStdin, table)
    };
    let cases: Vec<(Facts, &str)> = vec![
        (facts(Select, "public.photos"), "pass"),
        (facts(Select, "photo_paths kept"), "pass"),
        (facts(Select, "over_making"), "opaque function"),
        (Facts { locking: true, ..facts(Select, "users") }, "pass"),
        (calling(facts(Select, ""), "make"), "opaque function"),
        (calling(facts(Select, ""), "through"), "opaque function"),
        (calling(calling(facts(Select, ""), "pure"), "now"), "pass"),
        (calling(facts(Select, ""), "lo_unlink"), "opaque function"),
        (calling(facts(Select, ""), "nextval"), "pass"),
        (in_schema("pg_temp", "anything"), "opaque function"),
        (in_schema("pg_catalog", "make"), "pass"),
        (in_schema("public", "pure"), "pass"),
        (inside(CopyTo, calling(facts(Select, ""), "make")), "opaque function"),
        (inside(Declare { name: "c".into(), hold: false }, facts(Select, "photos")), "pass"),
        (facts(Insert, "public.photos"), "capture Row public.photos"),
        (facts(Update, "public.photos"), "capture Row public.photos"),
        (facts(Delete, "public.photos"), "capture Gone public.photos"),
        (facts(Update, "photos"), "opaque ambiguous_or_capture"),
        (facts(Insert, "same_name"), "capture Row other.same_name public.same_name"),
        (calling(facts(Insert, "public.photos"), "make"), "capture Row public.photos audited"),
        (assigning(facts(Update, "public.photos"), "path"), "capture Row public.photos"),
        (assigning(facts(Update, "public.photos"), "id"), "capture Moved public.photos"),
        (
            calling(assigning(facts(Update, "public.photos"), "id"), "pg_advisory_lock"),
            "opaque key-change public.photos",
        ),
        (
            Facts { current_of: true, ..assigning(facts(Update, "public.photos"), "id") },
            "opaque key-change public.photos",
        ),
        (upserting("public.photos", "path"), "capture Row public.photos"),
        (upserting("public.photos", "id"), "opaque key-change public.photos"),
        (Facts { on_conflict: Some(OnConflict::Nothing), ..facts(Insert, "users") }, "capture Row public.users"),
        (facts(Update, "users"), "capture Row public.users audited"),
        (facts(Delete, "users"), "capture Gone public.users audited"),
        (facts(Update, "rekeyed"), "capture Moved public.rekeyed"),
        (facts(Insert, "rekeyed"), "capture Row public.rekeyed"),
        (upserting("rekeyed", "n"), "opaque key-change public.rekeyed"),
        (facts(Update, "quiet"), "capture Row public.quiet"),
        (facts(Insert, "logged"), "capture Row public.logged audited"),
        (facts(Insert, "defaulted"), "capture Row public.defaulted audited"),
        (facts(Insert, "history"), "capture Row public.history"),
        (facts(Delete, "history"), "opaque keyless public.history"),
        (upserting("history", "what"), "opaque keyless public.history"),
        (Facts { current_of: true, ..facts(Update, "quiet") }, "capture Row public.quiet"),
        (facts(Insert, "secured"), "opaque row-security public.secured"),
        (facts(Delete, "ruled"), "opaque rule public.ruled"),
        (facts(Insert, "fewer"), "opaque definition public.fewer"),
        (facts(Update, "animals"), "opaque definition public.animals public.cats"),
        (facts(Update, "cats"), "capture Row public.cats"),
        (facts(Update, "parts.events_a"), "capture Row public.events"),
        (facts(Insert, "photo_paths"), "opaque view"),
        (facts(Insert, "staying"), "opaque trigger"),
        (facts(Insert, "only_old"), "pass"),
        (calling(facts(Insert, "only_old"), "make"), "opaque function"),
        (facts(Merge, "public.photos"), "opaque merge public.photos"),
        (facts(Merge, "only_old"), "pass"),
        (Facts { modifying_cte: true, ..facts(Insert, "public.photos history") }, "capture Row public.photos audited"),
        (Facts { modifying_cte: true, ..facts(Other, "only_old") }, "pass"),
        (truncate("public.photos", false), "truncate public.photos"),
        (truncate("users", true), "truncate public.by_email public.photos public.users"),
        (truncate("only_old", true), "pass"),
        (truncate("parent", true), "opaque truncate"),
        (truncate("public.photos only_old", false), "opaque truncate public.photos"),
        (truncate("logged", false), "opaque truncate"),
        (truncate("parts.events_a", false), "opaque truncate public.events"),
        (facts(CopyFromStdin, "public.photos"), "copy public.photos"),
        (copy("public.photos", &["id", "path"]), "copy public.photos"),
        (copy("public.photos", &["path"]), "copy public.photos"),
        (copy("history", &["at"]), "copy public.history"),
        (facts(CopyFromStdin, "history"), "copy public.history"),
        (facts(CopyFromStdin, "logged"), "copy public.logged audited"),
        (facts(CopyFromStdin, "parts.events_a"), "copy public.events"),
        (facts(CopyFromStdin, "secured"), "opaque row-security public.secured"),
        (facts(CopyFromStdin, "fewer"), "opaque definition public.fewer"),
        (facts(CopyFromStdin, "only_old"), "pass"),
        (facts(CopyFromServer, "history"), "opaque copy public.history"),
        (facts(Ddl { temporary: false }, ""), "opaque ddl unwrapped ddl"),
        (facts(Ddl { temporary: true }, ""), "pass"),
        (facts(Call, ""), "opaque call unwrapped"),
        (facts(Do, ""), "opaque do unwrapped"),
        (facts(Execute("s".into()), ""), "opaque execute"),
        (inside(Prepare("s".into()), facts(Insert, "history")), "pass"),
        (inside(Explain { analyze: false }, facts(Insert, "history")), "pass"),
        (inside(Explain { analyze: true }, facts(Insert, "history")), "opaque explain public.history"),
        (inside(Explain { analyze: true }, facts(Select, "history")), "pass"),
        (facts(Other, ""), "opaque unparsed"),
        (facts(Begin { read_only: None, bare: true }, ""), "pass"),
        (facts(Maintenance, ""), "pass"),
    ];
    for (facts, expected) in &cases {
        let plan = told(&plan::plan(facts, &catalog, Side::Old, None, true));
        // Two tables of one bare name: one hidden column serves both, since it names no column.
        let expected = expected.replace("opaque ambiguous_or_capture", "capture Row other.photos public.photos");
        // MERGE returns its rows from 17 on.
        let merge = if catalog.version.old < 170_000 { "opaque merge" } else { "capture Merged" };
        let expected = expected.replace("opaque merge", merge);
        assert_eq!(plan, expected, "{facts:?}");
    }
    let update = facts(Update, "public.photos");
    for (role, expected) in [
        ("writer", "opaque privilege public.photos"),
        ("columns_only", "opaque privilege public.photos"),
        ("reader", "capture Row public.photos"),
    ] {
        assert_eq!(told(&plan::plan(&update, &catalog, Side::Old, Some(role), true)), expected);
    }
}

#[tokio::test]
async fn the_hidden_column_is_spelled_so_that_the_server_takes_it() {
    let server = Server::start().await;
    let (old, new) = shop(&server, true).await;
    let catalog = catalog::load(&old, &new, None, &[]).await.unwrap();
    let splice = |facts: &Facts, matches: bool| match plan::plan(facts, &catalog, Side::Old, None, matches) {
        Plan::Capture(found) => found.splice.end.clone(),
        other => panic!("{other:?}"),
    };
    let photos = facts(Verb::Update, "public.photos");
    assert_eq!(splice(&photos, true), " RETURNING pg_catalog.record_send(ROW(photos.tableoid, photos.*))");
    let returning = Facts { returning: true, ..photos.clone() };
    assert_eq!(splice(&returning, true), ", pg_catalog.record_send(ROW(photos.tableoid, photos.*))");
    assert!(splice(&photos, false).contains("convert_to("));
    let two = facts(Verb::Update, "photos");
    assert_eq!(told(&plan::plan(&two, &catalog, Side::Old, None, false)), "opaque ambiguous");
    let excepted = catalog::load(&old, &new, None, &["other.photos".into()]).await.unwrap();
    assert_eq!(told(&plan::plan(&two, &excepted, Side::Old, None, false)), "opaque ambiguous");
    assert_eq!(told(&plan::plan(&two, &excepted, Side::Old, None, true)), "capture Row public.photos");
    assert_eq!(told(&plan::plan(&photos, &excepted, Side::Old, None, false)), "capture Row public.photos");
    let joined = Facts { reads: vec![Name { schema: Some("other".into()), name: "photos".into() }], ..photos.clone() };
    assert_eq!(told(&plan::plan(&joined, &catalog, Side::Old, None, true)), "opaque ambiguous");
    let aliased = |row: &str, facts: &Facts| {
        let mut facts = facts.clone();
        facts.targets[0].row = row.into();
        facts
    };
    let insert = facts(Verb::Insert, "public.photos");
    let delete = facts(Verb::Delete, "public.photos");
    let partition = facts(Verb::Insert, "parts.events_b1");
    let statements = [
        (insert.clone(), "INSERT INTO public.photos (id) VALUES (1), (2), (3)"),
        (
            aliased("\"P q\"", &insert),
            "INSERT INTO public.photos AS \"P q\" (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET path = excluded.path WHERE \"P q\".id = 1",
        ),
        (
            insert.clone(),
            "WITH w AS (SELECT 9 AS id) INSERT INTO public.photos (id) SELECT id FROM w ON CONFLICT DO NOTHING",
        ),
        (photos.clone(), "UPDATE ONLY public.photos SET path = 'x' FROM users photos_2 WHERE photos.id = 1"),
        (aliased("x", &photos), "UPDATE public.photos x SET path = y.path FROM public.photos y WHERE y.id = x.id"),
        (aliased("\"select\"", &photos), "UPDATE public.photos * AS \"select\" SET path = NULL"),
        (
            Facts { returning: true, ..photos.clone() },
            "UPDATE public.photos SET path = 'y' WHERE id IN (SELECT id FROM public.photos) RETURNING *, id + 1 AS n",
        ),
        (delete.clone(), "DELETE FROM photos USING users WHERE users.id = photos.id"),
        (aliased("d", &delete), "DELETE FROM photos d WHERE d.id = 2"),
        (partition, "INSERT INTO parts.events_b1 VALUES (1, 'b', 2)"),
    ];
    for matches in [true, false] {
        for (facts, statement) in &statements {
            let text = format!("{statement}{}", splice(facts, matches));
            old.batch_execute("BEGIN").await.unwrap();
            old.batch_execute(&text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
            old.batch_execute("ROLLBACK").await.unwrap();
        }
    }
}

#[tokio::test]
async fn explain_tells_what_happens_in_each_phase() {
    let server = Server::start().await;
    let (old, new) = shop(&server, true).await;
    let catalog = catalog::load(&old, &new, None, &[]).await.unwrap();
    let text = "UPDATE quiet SET at = now();";
    let told = plan::explain(text, &Facts { end: text.len() - 1, ..facts(Verb::Update, "quiet") }, &catalog);
    let expected = "\
statement    update
writes       quiet
old            runs on old, as it is
dual-write     runs on old; each row as it then is, of public.quiet, is mirrored to new. Sent to old as
               UPDATE quiet SET at = now() RETURNING pg_catalog.record_send(ROW(quiet.tableoid, quiet.*))
";
    assert!(told.starts_with(expected), "{told}");
    let told = plan::explain("", &facts(Verb::Insert, "fewer"), &catalog);
    assert!(
        told.contains(
            "dual-write     runs on old, as it is, and is not captured: public.fewer: column b is missing on new."
        ),
        "{told}"
    );
    assert!(told.contains("new-primary    runs on new"), "{told}");
}
