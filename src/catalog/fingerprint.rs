//! Whether definitions have changed, in one cheap query.

use tokio_postgres::{Client, Error};

/// What a definition consists of, without what statistics, VACUUM or an ordinary write change. Sums of hashes do not depend on an order;
/// each part carries its catalog's name, so that no row of one can stand for a row of another.
const QUERY: &str = "
WITH schemas AS MATERIALIZED (
    SELECT oid, nspname FROM pg_catalog.pg_namespace
    WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'crossfade') AND nspname !~ '^pg_(toast|temp)'
), relations AS MATERIALIZED (
    SELECT c.* FROM pg_catalog.pg_class c JOIN schemas s ON s.oid = c.relnamespace
), parts(hash) AS (
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'schema', oid, nspname), 0) FROM schemas
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'class', oid, relnamespace, relname, relkind, relowner, relispartition,
           relrowsecurity, relforcerowsecurity, relhasrules, relacl), 0) FROM relations
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'attribute', a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull,
           a.attgenerated, a.attidentity, a.attisdropped, a.attcollation, a.atthasdef), 0)
    FROM pg_catalog.pg_attribute a JOIN relations c ON c.oid = a.attrelid WHERE a.attnum > 0
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'default', d.oid, d.adrelid, d.adnum, d.xmin), 0)
    FROM pg_catalog.pg_attrdef d JOIN relations c ON c.oid = d.adrelid
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'index', i.indexrelid, i.indrelid, i.indisunique, i.indisprimary, i.indisvalid, i.indisready,
           i.indimmediate, i.indkey, i.indcollation, i.indpred IS NULL), 0)
    FROM pg_catalog.pg_index i JOIN relations c ON c.oid = i.indrelid
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'constraint', k.oid, k.contype, k.conrelid, k.contypid, k.confrelid, k.conkey, k.confkey,
           k.confupdtype, k.confdeltype, k.condeferrable, k.xmin), 0)
    FROM pg_catalog.pg_constraint k JOIN schemas s ON s.oid = k.connamespace
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'trigger', t.oid, t.tgrelid, t.tgfoid, t.tgtype, t.tgenabled, t.xmin), 0)
    FROM pg_catalog.pg_trigger t JOIN relations c ON c.oid = t.tgrelid WHERE NOT t.tgisinternal AND t.tgname NOT IN ('crossfade_fence', '~crossfade_lazy_bring', 'crossfade_lazy_gone')
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'policy', p.oid, p.polrelid, p.xmin), 0) FROM pg_catalog.pg_policy p
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'rewrite', r.oid, r.ev_class, r.ev_enabled, r.xmin), 0)
    FROM pg_catalog.pg_rewrite r JOIN relations c ON c.oid = r.ev_class
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'function', p.oid, p.proname, p.pronamespace, p.provolatile, p.prolang, p.xmin), 0)
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'type', t.oid, t.typname, t.typnamespace, t.typtype, t.typbasetype, t.typsend, t.typreceive, t.typrelid), 0)
    FROM pg_catalog.pg_type t JOIN schemas s ON s.oid = t.typnamespace
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'inherits', h.inhrelid, h.inhparent), 0) FROM pg_catalog.pg_inherits h
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'role', r.oid, r.rolname, r.rolsuper, r.rolinherit, r.rolbypassrls), 0) FROM pg_catalog.pg_roles r
    UNION ALL
    SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('|', 'member', m.roleid, m.member, pg_catalog.to_jsonb(m)->>'inherit_option'), 0) FROM pg_catalog.pg_auth_members m
)
SELECT pg_catalog.concat_ws(':', pg_catalog.count(*), pg_catalog.sum(hash)) FROM parts";

/// A word that changes when a table, column, type, key, trigger, policy, rule, function, role or privilege of a user's schema does.
/// It says nothing of temporary objects and of what the system owns. Compare it only with one of the same server, taken before
/// the catalog was loaded, so that a change in between is noticed the next time.
pub async fn fingerprint(client: &Client) -> Result<String, Error> {
    client.query_one(QUERY, &[]).await.map(|row| row.get(0))
}
