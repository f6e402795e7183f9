//! How much is owed, for metrics and status.
