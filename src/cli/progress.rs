//! What long work shows: bars on a terminal, a line now and then elsewhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::catalog::Table;
use crate::shared::lock;

/// Between two lines about a table, where there is no terminal.
const LINE: Duration = Duration::from_secs(10);
/// A bar's length: shares in thousandths of a percent.
const WHOLE: u64 = 100_000;

/// What is shown of one table.
struct Shown {
    label: String,
    bar: Option<ProgressBar>,
    rows: u64,
    begun: Option<(Instant, f64)>,
    said: Instant,
    waits: bool,
    /// What the share is a share of.
    of: &'static str,
}

/// Bars on a terminal, a line now and then elsewhere.
pub(super) struct Show {
    bars: MultiProgress,
    tables: Mutex<BTreeMap<u32, Shown>>,
}

impl Show {
    /// For work on these tables; `of`: what the share of each is a share of.
    pub fn new(tables: &[Arc<Table>], of: &'static str) -> Show {
        let bars = MultiProgress::new();
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let style = ProgressStyle::with_template("{prefix:30!} {bar:30} {percent:>3}%  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let shown = |table: &Arc<Table>| {
            let bar = terminal.then(|| {
                let bar = bars.add(ProgressBar::new(WHOLE).with_style(style.clone()));
                bar.set_prefix(table.label());
                bar
            });
            let (label, said) = (table.label(), Instant::now());
            (table.number, Shown { label, bar, rows: 0, begun: None, said, waits: false, of })
        };
        let tables = Mutex::new(tables.iter().map(shown).collect());
        Show { bars, tables }
    }

    /// So many more rows of a table are done, and this share (0 to 1) in all.
    pub fn rows(&self, table: u32, rows: u64, share: f64) {
        self.with(table, |shown| shown.rows(rows, share));
    }

    /// A table is done.
    pub fn done(&self, table: u32, how: &str) {
        self.with(table, |shown| shown.end(how));
    }

    /// Said of a table.
    pub fn said(&self, table: u32, what: &str) {
        self.with(table, |shown| shown.say(what));
    }

    /// Said once, until rows are done.
    pub fn waits(&self, table: u32, what: &str) {
        self.with(table, |shown| {
            if !std::mem::replace(&mut shown.waits, true) {
                shown.say(what);
            }
        });
    }

    /// A line about all of it.
    pub fn line(&self, line: &str) {
        if self.bars.println(line).is_err() || self.bars.is_hidden() {
            eprintln!("{line}");
        }
    }

    /// What a table's work has come to, on the standard output; its bar goes.
    pub fn result(&self, table: u32, text: &str) {
        self.with(table, |shown| shown.bar.iter().for_each(ProgressBar::finish_and_clear));
        self.bars.suspend(|| print!("{text}"));
    }

    /// The bars stay as they are.
    pub fn end(&self) {
        for shown in lock(&self.tables).values().filter_map(|shown| shown.bar.as_ref()) {
            if !shown.is_finished() {
                shown.abandon();
            }
        }
    }

    fn with(&self, table: u32, what: impl FnOnce(&mut Shown)) {
        if let Some(shown) = lock(&self.tables).get_mut(&table) {
            what(shown);
        }
    }
}

impl Shown {
    fn rows(&mut self, rows: u64, share: f64) {
        self.rows += rows;
        self.waits = false;
        let (begun, first) = *self.begun.get_or_insert_with(|| (Instant::now(), share));
        let seconds = begun.elapsed().as_secs_f64();
        let per_second = self.rows as f64 / seconds.max(0.1);
        let left = match share - first {
            covered if covered > 0.0 => {
                let left = Duration::from_secs((seconds * (1.0 - share) / covered) as u64);
                format!(", {} left", indicatif::HumanDuration(left))
            }
            _ => String::new(),
        };
        let line = format!("{} rows, {per_second:.0} rows/s{left}", self.rows);
        match &self.bar {
            Some(bar) => {
                bar.set_position((share * WHOLE as f64) as u64);
                bar.set_message(line);
            }
            None if self.said.elapsed() > LINE => self.say(&format!("{:.1}% {}, {line}", share * 100.0, self.of)),
            None => {}
        }
    }

    fn end(&mut self, how: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(WHOLE);
        }
        let rows = self.rows;
        self.say(&if rows > 0 { format!("{how}, {rows} rows") } else { how.to_owned() });
    }

    fn say(&mut self, text: &str) {
        self.said = Instant::now();
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => println!("{}: {text}", self.label),
        }
    }
}
