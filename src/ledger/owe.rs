//! The statements that write a debt, in the transaction that owes it. Rows are inserted by whatever role the client has: `schema.sql` grants that.

/// A debt. Its parameters: id, the carrier's xid, pid, start and incarnation, the debts, the reason.
///
/// A mirrored transaction's commit must be durable, since the mirror will have its rows: where `synchronous_commit` is off it is made `local` for this one.
pub const OWE: &str = "INSERT INTO crossfade.ledger (id, carrier_xid, carrier_pid, carrier_start, carrier_incarnation, debts, reason) \
    VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' \
    AND pg_catalog.set_config('synchronous_commit', 'local', true) IS NULL THEN NULL ELSE $7 END)";

/// Types of `OWE`'s parameters.
pub const OWE_TYPES: [u32; 7] = [20, 20, 23, 20, 2950, 17, 25];

/// A taint, unless the transaction has written nothing at all. Its parameters: id, the debts, the reason.
pub const TAINT: &str = "INSERT INTO crossfade.ledger (id, debts, reason) \
    SELECT $1, $2, CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' \
    AND pg_catalog.set_config('synchronous_commit', 'local', true) IS NULL THEN NULL ELSE $3 END \
    WHERE pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL";

/// Types of `TAINT`'s parameters.
pub const TAINT_TYPES: [u32; 3] = [20, 17, 25];
