//! The statements that write a debt, in the transaction that owes it. Rows are inserted by whatever role the client has: `schema.sql` grants that.

/// A debt. Its parameters: id, the carrier's xid, pid, start and incarnation, the debts, the reason, the version of the definitions that the images were
/// taken under (NULL: none), and what is owed if another one holds now (`crossfade.version`): the images may mean something else then. It returns
/// that version, or NULL where all is well; -1: the transaction has changed definitions itself.
///
/// The version is not the transaction's: whatever its snapshot, it is read as it is. What the transaction wrote to is locked, so that it holds since then.
///
/// A mirrored transaction's commit must be durable, since the mirror will have its rows: where `synchronous_commit` is off it is made `local` for this one.
pub const OWE: &str = "INSERT INTO crossfade.ledger (id, carrier_xid, carrier_pid, carrier_start, carrier_incarnation, debts, reason) \
    VALUES ($1, $2, $3, $4, $5, CASE WHEN pg_catalog.pg_sequence_last_value('crossfade.version'::pg_catalog.regclass) OPERATOR(pg_catalog.<>) $8 \
    THEN $9 ELSE $6::pg_catalog.bytea END, CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' \
    AND pg_catalog.set_config('synchronous_commit', 'local', true) IS NULL THEN NULL ELSE $7 END) \
    RETURNING CASE WHEN pg_catalog.pg_sequence_last_value('crossfade.version'::pg_catalog.regclass) OPERATOR(pg_catalog.<>) $8 \
    THEN crossfade.version_now() END";

/// Types of `OWE`'s parameters.
pub const OWE_TYPES: [u32; 9] = [20, 20, 23, 20, 2950, 17, 25, 20, 17];

/// The same question where nothing is owed beforehand (`best-effort`). Its parameters: id, the version, and what is owed if another one holds now.
pub const PROVE: &str = "INSERT INTO crossfade.ledger (id, debts, reason) SELECT $1, $3, 'definition' \
    WHERE pg_catalog.pg_sequence_last_value('crossfade.version'::pg_catalog.regclass) OPERATOR(pg_catalog.<>) $2 RETURNING crossfade.version_now()";

/// Types of `PROVE`'s parameters.
pub const PROVE_TYPES: [u32; 3] = [20, 20, 17];

/// A taint, unless the transaction has written nothing at all. Its parameters: id, the debts, the reason.
pub const TAINT: &str = "INSERT INTO crossfade.ledger (id, debts, reason) \
    SELECT $1, $2, CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' \
    AND pg_catalog.set_config('synchronous_commit', 'local', true) IS NULL THEN NULL ELSE $3 END \
    WHERE pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL";

/// Types of `TAINT`'s parameters.
pub const TAINT_TYPES: [u32; 3] = [20, 17, 25];
