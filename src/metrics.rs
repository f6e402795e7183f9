//! What Prometheus scrapes. Names are fixed by the contract; nothing here decides anything.

use std::sync::Mutex;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::phase::{Phase, Side};

/// The proxy's metrics.
pub struct Metrics {
    registry: Registry,
    phase: IntGaugeVec,
    /// Number of the move that made the phase so.
    pub epoch: IntGauge,
    /// Clients that have logged in.
    pub clients: IntGauge,
    /// Server sessions, by side.
    pub server_connections: IntGaugeVec,
    /// Statements, by class and side.
    pub statements: IntCounterVec,
    /// Seconds from a statement's arrival to the end of its answer, on old and on new.
    statement_seconds: [Histogram; 2],
    /// Images that went over, by table.
    pub mirror_images: IntCounterVec,
    /// Seconds that COMMIT waited for the mirror.
    pub mirror_commit_seconds: Histogram,
    /// Transactions that the mirror did not take, by reason.
    pub mirror_failures: IntCounterVec,
    /// Transactions that have written on both sides, are prepared on new and not decided on old.
    pub in_doubt: IntGauge,
    /// Crashes and promotions of each side that this proxy has noticed.
    pub new_lives: IntCounterVec,
    /// 0 while the circuit breaker is open.
    pub mirror_up: IntGauge,
    debt_keys: IntGaugeVec,
    /// Ledger rows whose mirror transaction is still at work.
    pub debt_in_flight: IntGauge,
    /// Age of the oldest debt.
    pub debt_oldest_seconds: Gauge,
    /// Size of the ledger on the authority.
    pub ledger_bytes: IntGauge,
    /// Writes out of sight, by reason.
    pub opaque_writes: IntCounterVec,
    /// Tables with an open taint.
    pub tainted_tables: IntGauge,
    /// Taints, by table.
    pub taints: IntCounterVec,
    /// Reads that were run on both sides and compared, by table.
    pub read_compared: IntCounterVec,
    /// Those whose answers differ, and did again, by table.
    pub read_different: IntCounterVec,
    /// Reads that were to be compared and found no place in the queue.
    pub read_dropped: IntCounter,
    /// In dual-read, eligible reads by the side that answered them.
    pub read_served: IntCounterVec,
    /// Reads of lazy tables where new is the authority, by who answered: one side for its key, or both merged.
    pub lazy_reads: IntCounterVec,
    /// In dual-read, eligible reads that the authority answered, by reason.
    pub read_kept: IntCounterVec,
    backfill_rows: IntCounterVec,
    backfill_progress: GaugeVec,
    /// Rows that this proxy has verified in the background, by table.
    pub verify_rows: IntCounterVec,
    /// Rows that differed when a table was verified last, by whomever.
    pub verify_different: IntGaugeVec,
    /// Bytes of write-ahead log that a server keeps for the sweep's slot, by side.
    pub sweep_retained_bytes: IntGaugeVec,
    /// Bytes of write-ahead log of the authority that have not been swept, while this proxy sweeps.
    pub sweep_behind_bytes: IntGauge,
    /// Changes of migrating tables that this proxy has swept.
    pub sweep_changes: IntCounter,
    /// Keys that this proxy's sweep has entered as debts.
    pub sweep_owed: IntCounter,
    /// Taints that this proxy's sweep has cleared.
    pub sweep_taints_cleared: IntCounter,
    /// Slots that were given up: what is written before the next one begins is not swept.
    pub sweep_lost: IntCounter,
    /// 1 while this proxy's file says another phase than holds, and nothing is done about it.
    pub file_disagrees: IntGauge,
    /// Files that were refused.
    pub config_reload_failures: IntCounter,
    /// Statements whose plan was known.
    pub plan_hits: IntCounter,
    /// Statements that had to be read.
    pub plan_misses: IntCounter,
    /// Size of the plan cache.
    pub plan_cache_bytes: IntGauge,
    /// Seconds that moves held clients.
    pub move_pause_seconds: Histogram,
    shown: Mutex<Vec<String>>,
}

fn buckets() -> Vec<f64> {
    vec![0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
}

/// A metric that could not be registered: two of one name.
pub type MetricError = prometheus::Error;

impl Metrics {
    /// All at zero.
    pub fn new() -> Result<Metrics, MetricError> {
        let registry = Registry::new_custom(Some("crossfade".into()), None)?;
        let r = &registry;
        let metrics = Metrics {
            phase: gauges(r, "phase", "1 for the phase that holds", &["phase"])?,
            epoch: gauge(r, "epoch", "Number of the move that made the phase so")?,
            clients: gauge(r, "clients", "Clients that have logged in")?,
            server_connections: gauges(r, "server_connections", "Sessions on the servers", &["side"])?,
            statements: counters(r, "statements_total", "Statements", &["class", "side"])?,
            statement_seconds: {
                let options =
                    HistogramOpts::new("statement_seconds", "Time from a statement's arrival to the end of its answer")
                        .buckets(buckets());
                let vec = HistogramVec::new(options, &["class", "side"])?;
                r.register(Box::new(vec.clone()))?;
                Side::BOTH.map(|side| vec.with_label_values(&["all", side.name()]))
            },
            mirror_images: counters(r, "mirror_images_total", "Images that went over to the mirror", &["table"])?,
            mirror_commit_seconds: histogram(r, "mirror_commit_seconds", "Time that a COMMIT waited for the mirror")?,
            mirror_failures: counters(
                r,
                "mirror_failures_total",
                "Transactions that the mirror did not take",
                &["reason"],
            )?,
            in_doubt: gauge(
                r,
                "in_doubt_transactions",
                "Transactions over both sides that are prepared and not decided",
            )?,
            new_lives: {
                let help = "Crashes and promotions of this database that were noticed";
                let vec = counters(r, "new_lives_total", help, &["side"])?;
                Side::BOTH.iter().for_each(|side| drop(vec.with_label_values(&[side.name()])));
                vec
            },
            mirror_up: gauge(r, "mirror_up", "0 while the mirror is known to be down")?,
            debt_keys: gauges(r, "debt_keys", "Debts owed (a whole-table debt counts as one)", &["table"])?,
            debt_in_flight: gauge(r, "debt_in_flight", "Debts whose mirror transaction is still at work")?,
            debt_oldest_seconds: float(r, "debt_oldest_seconds", "Age of the oldest debt")?,
            ledger_bytes: gauge(r, "ledger_bytes", "Size of the ledger on the authority")?,
            opaque_writes: counters(
                r,
                "opaque_writes_total",
                "Writes whose images could not be captured",
                &["reason"],
            )?,
            taints: counters(r, "taints_total", "Times that a write out of sight has tainted a table", &["table"])?,
            tainted_tables: gauge(r, "tainted_tables", "Tables with an open taint")?,
            read_compared: counters(r, "read_compared_total", "Reads run on both sides and compared", &["table"])?,
            read_different: counters(r, "read_different_total", "Reads whose answers differ", &["table"])?,
            read_dropped: counter(r, "read_dropped_total", "Reads that were not compared because too many waited")?,
            read_served: counters(r, "read_served_total", "Eligible reads in dual-read, by who answered", &["side"])?,
            lazy_reads: counters(
                r,
                "lazy_reads_total",
                "Reads of lazy tables: answered by old or by new for their key, or merged",
                &["by"],
            )?,
            read_kept: counters(r, "read_kept_total", "Eligible reads that the authority answered", &["reason"])?,
            backfill_rows: counters(
                r,
                "backfill_rows_total",
                "Rows that backfills have brought to the mirror or compared there",
                &["table"],
            )?,
            backfill_progress: {
                let vec = GaugeVec::new(
                    Opts::new("backfill_progress", "Share of a table that was copied or compared"),
                    &["table"],
                )?;
                r.register(Box::new(vec.clone()))?;
                vec
            },
            verify_rows: counters(
                r,
                "verify_rows_total",
                "Rows that this proxy has verified in the background",
                &["table"],
            )?,
            verify_different: gauges(
                r,
                "verify_different_rows",
                "Rows that differed when the table was verified last",
                &["table"],
            )?,
            sweep_retained_bytes: gauges(
                r,
                "sweep_retained_bytes",
                "Bytes of write-ahead log that a server keeps for the sweep's slot",
                &["side"],
            )?,
            sweep_behind_bytes: gauge(r, "sweep_behind_bytes", "Bytes of write-ahead log that were not swept yet")?,
            sweep_changes: counter(r, "sweep_changes_total", "Changes of migrating tables that were swept")?,
            sweep_owed: counter(r, "sweep_owed_keys_total", "Keys that a sweep has entered as debts")?,
            sweep_taints_cleared: counter(r, "sweep_taints_cleared_total", "Taints that a sweep has cleared")?,
            sweep_lost: counter(r, "sweep_lost_total", "Slots that were given up")?,
            file_disagrees: gauge(r, "file_disagrees", "1 while the file says another phase than the one that holds")?,
            config_reload_failures: counter(
                r,
                "config_reload_failures_total",
                "Configuration files that were refused",
            )?,
            plan_hits: counter(r, "plan_cache_hits_total", "Statements whose plan was known")?,
            plan_misses: counter(r, "plan_cache_misses_total", "Statements that had to be read")?,
            plan_cache_bytes: gauge(r, "plan_cache_bytes", "Size of the plan cache")?,
            move_pause_seconds: histogram(r, "move_pause_seconds", "Time that moves held clients")?,
            shown: Mutex::new(Vec::new()),
            registry: registry.clone(),
        };
        metrics.mirror_up.set(1);
        Ok(metrics)
    }

    /// A statement has been answered.
    pub fn observe_statement(&self, side: Side, seconds: f64) {
        self.statement_seconds[usize::from(side == Side::New)].observe(seconds);
    }

    /// Shows the phase that holds.
    pub fn set_phase(&self, holds: Phase, epoch: u64) {
        for phase in Phase::ALL {
            self.phase.with_label_values(&[phase.name()]).set(i64::from(phase == holds));
        }
        self.epoch.set(epoch as i64);
    }

    /// Shows the debts owed, by table; tables shown before and not named now go to 0.
    pub fn set_debts(&self, owed: &[(String, i64)]) {
        let mut shown = self.shown.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for table in shown.iter().filter(|table| !owed.iter().any(|(name, _)| name == *table)) {
            self.debt_keys.with_label_values(&[table]).set(0);
        }
        for (table, count) in owed {
            self.debt_keys.with_label_values(&[table]).set(*count);
            if !shown.contains(table) {
                shown.push(table.clone());
            }
        }
    }

    /// Shows how far the backfill of a table is: rows, and the share of its keys (0 to 1).
    pub fn set_backfill(&self, table: &str, rows: u64, share: f64) {
        let counter = self.backfill_rows.with_label_values(&[table]);
        if rows < counter.get() {
            // Another one has begun.
            counter.reset();
        }
        counter.inc_by(rows - counter.get());
        self.backfill_progress.with_label_values(&[table]).set(share);
    }

    /// Sessions on one side.
    pub fn servers(&self, side: Side) -> IntGauge {
        self.server_connections.with_label_values(&[side.name()])
    }

    /// Prometheus' text format, with the process's own metrics.
    pub fn text(&self) -> String {
        let mut families = self.registry.gather();
        families.extend(prometheus::gather());
        let mut out = Vec::new();
        match TextEncoder::new().encode(&families, &mut out) {
            Ok(()) => String::from_utf8_lossy(&out).into_owned(),
            Err(error) => format!("# {error}\n"),
        }
    }
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, MetricError> {
    let gauge = IntGauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

fn float(registry: &Registry, name: &str, help: &str) -> Result<Gauge, MetricError> {
    let gauge = Gauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricError> {
    let vec = IntGaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(vec.clone()))?;
    Ok(vec)
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, MetricError> {
    let counter = IntCounter::new(name, help)?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricError> {
    let vec = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(vec.clone()))?;
    Ok(vec)
}

fn histogram(registry: &Registry, name: &str, help: &str) -> Result<Histogram, MetricError> {
    let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets()))?;
    registry.register(Box::new(histogram.clone()))?;
    Ok(histogram)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_phase_holds_and_debts_go_back_to_zero() {
        let metrics = Metrics::new().unwrap();
        metrics.set_phase(Phase::DualWrite, 3);
        metrics.set_debts(&[("public.a".into(), 2)]);
        metrics.set_debts(&[("public.b".into(), 1)]);
        let text = metrics.text();
        for line in [
            "crossfade_phase{phase=\"dual-write\"} 1",
            "crossfade_phase{phase=\"old\"} 0",
            "crossfade_epoch 3",
            "crossfade_debt_keys{table=\"public.a\"} 0",
            "crossfade_debt_keys{table=\"public.b\"} 1",
            "process_resident_memory_bytes",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
