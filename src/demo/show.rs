//! What people see while it runs: on a terminal a few lines that are drawn again four times a second, elsewhere a line
//! now and then.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::proxy::Gauges;

/// What everybody writes on, and the display reads.
#[derive(Debug)]
pub struct Board {
    started: Instant,
    written: Mutex<Written>,
    /// Transactions of pgbench per second, from its last progress report.
    pub pgbench_rate: AtomicU64,
}

#[derive(Debug, Default)]
struct Written {
    now: String,
    notes: Vec<String>,
    errors: Vec<String>,
    error_count: u64,
    latencies_us: Vec<u64>,
    gauges: Gauges,
    owed_most: u64,
    longest: Longest,
}

/// The longest single operation of a client, connecting included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Longest {
    /// In microseconds.
    pub us: u64,
    /// What was happening meanwhile.
    pub during: String,
}

/// Errors kept to be shown in the end.
const ERRORS_KEPT: usize = 10;
const REDRAW: Duration = Duration::from_millis(250);
const LINE: Duration = Duration::from_secs(2);

impl Board {
    /// An empty one; its clock starts.
    pub fn new() -> Board {
        Board { started: Instant::now(), written: Mutex::default(), pgbench_rate: AtomicU64::new(0) }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        // What a panicking thread left is a line of text too few.
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long it has been running.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// What happens from now on.
    pub fn say(&self, what: impl Into<String>) {
        let what = what.into();
        let mut written = self.written();
        let elapsed = self.started.elapsed().as_secs_f64();
        written.notes.push(format!("{elapsed:5.1} s  {what}"));
        written.now = what;
    }

    /// A client's operation took this long.
    pub fn operation(&self, us: u64) {
        let mut written = self.written();
        written.latencies_us.push(us);
        if us > written.longest.us {
            written.longest = Longest { us, during: written.now.clone() };
        }
    }

    /// The longest operation so far.
    pub fn longest(&self) -> Longest {
        self.written().longest.clone()
    }

    /// A client has seen an error.
    pub fn error(&self, what: String) {
        let mut written = self.written();
        written.error_count += 1;
        if written.errors.len() < ERRORS_KEPT {
            let elapsed = self.started.elapsed().as_secs_f64();
            written.errors.push(format!("at {elapsed:.1} s: {what}"));
        }
    }

    /// What the proxy says of itself.
    pub fn observe(&self, gauges: Gauges) {
        let mut written = self.written();
        written.owed_most = written.owed_most.max(gauges.owed + gauges.in_flight);
        written.gauges = gauges;
    }

    /// The first errors that clients saw.
    pub fn errors(&self) -> Vec<String> {
        self.written().errors.clone()
    }

    /// The largest debt seen, owed and in flight.
    pub fn owed_most(&self) -> u64 {
        self.written().owed_most
    }
}

impl Default for Board {
    fn default() -> Board {
        Board::new()
    }
}

/// One look at the board: rates and latencies since the look before.
#[derive(Debug, Default)]
struct Look {
    now: String,
    gauges: Gauges,
    errors: u64,
    rate: f64,
    pgbench_rate: u64,
    p50_us: u64,
    p99_us: u64,
}

/// Shows the board until it is dropped or aborted.
pub struct Display {
    board: Arc<Board>,
    looked: Instant,
    lines_drawn: usize,
    notes_shown: usize,
}

impl Display {
    /// Of this board.
    pub fn new(board: Arc<Board>) -> Display {
        Display { board, looked: Instant::now(), lines_drawn: 0, notes_shown: 0 }
    }

    /// Draws for ever, on standard error.
    pub async fn run(mut self) {
        let live = std::io::stderr().is_terminal();
        let mut ticks = tokio::time::interval(if live { REDRAW } else { LINE });
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        // Rates over a quarter of a second jump about: a look covers one second.
        let mut look = Look::default();
        loop {
            ticks.tick().await;
            if self.looked.elapsed() >= Duration::from_secs(1) {
                look = self.look();
            } else {
                self.refresh(&mut look);
            }
            let notes = self.new_notes();
            let text = if live { self.drawing(&notes, &look) } else { plain(&notes, &look, self.board.elapsed()) };
            // Nobody reads: the demo goes on.
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }

    fn look(&mut self) -> Look {
        let seconds = self.looked.elapsed().as_secs_f64();
        self.looked = Instant::now();
        let mut latencies = std::mem::take(&mut self.board.written().latencies_us);
        latencies.sort_unstable();
        let mut look = Look {
            rate: latencies.len() as f64 / seconds,
            p50_us: percentile(&latencies, 50),
            p99_us: percentile(&latencies, 99),
            ..Look::default()
        };
        self.refresh(&mut look);
        look
    }

    fn refresh(&self, look: &mut Look) {
        let written = self.board.written();
        look.now.clone_from(&written.now);
        look.gauges.clone_from(&written.gauges);
        look.errors = written.error_count;
        look.pgbench_rate = self.board.pgbench_rate.load(Ordering::Relaxed);
    }

    fn new_notes(&mut self) -> Vec<String> {
        let written = self.board.written();
        let notes = written.notes[self.notes_shown..].to_vec();
        self.notes_shown = written.notes.len();
        notes
    }

    /// Notes stay above; the lines below them are drawn over the ones before.
    fn drawing(&mut self, notes: &[String], look: &Look) -> String {
        let mut text = String::new();
        if self.lines_drawn > 0 {
            text.push_str(&format!("\x1b[{}A\x1b[J", self.lines_drawn));
        }
        // A line that the terminal folds would be two to move back over.
        text.push_str("\x1b[?7l");
        for note in notes {
            text.push_str(&format!("{note}\n"));
        }
        let gauges = &look.gauges;
        let mirror = if gauges.mirror_up { "\x1b[32mup\x1b[0m" } else { "\x1b[31mdown\x1b[0m" };
        let errors =
            if look.errors == 0 { "\x1b[32m0\x1b[0m".to_owned() } else { format!("\x1b[31m{}\x1b[0m", look.errors) };
        let lines = [
            String::new(),
            format!("  phase    \x1b[1m{}\x1b[0m   {:.1} s", gauges.phase_name(), self.board.elapsed().as_secs_f64()),
            format!(
                "  clients  {:.0}/s and pgbench {}/s   p50 {}   p99 {}   errors {errors}",
                look.rate,
                look.pgbench_rate,
                milliseconds(look.p50_us),
                milliseconds(look.p99_us)
            ),
            format!(
                "  mirror   {}   debt {} owed, {} in flight",
                if gauges.has_mirror() { mirror } else { "-" },
                gauges.owed,
                gauges.in_flight
            ),
            format!("  now      {}", look.now),
        ];
        for line in &lines {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str("\x1b[?7h");
        self.lines_drawn = lines.len();
        text
    }
}

fn plain(notes: &[String], look: &Look, elapsed: Duration) -> String {
    let mut text = String::new();
    for note in notes {
        text.push_str(&format!("{note}\n"));
    }
    let gauges = &look.gauges;
    let mirror = match (gauges.has_mirror(), gauges.mirror_up) {
        (false, _) => "-",
        (true, true) => "up",
        (true, false) => "down",
    };
    text.push_str(&format!(
        "{:5.1} s    phase {}, clients {:.0}/s, pgbench {}/s, p50 {}, p99 {}, mirror {mirror}, debt {} owed {} in flight, errors {}\n",
        elapsed.as_secs_f64(),
        gauges.phase_name(),
        look.rate,
        look.pgbench_rate,
        milliseconds(look.p50_us),
        milliseconds(look.p99_us),
        gauges.owed,
        gauges.in_flight,
        look.errors,
    ));
    text
}

/// `sorted` in ascending order; 0 when it is empty.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// `1.2 ms`.
pub fn milliseconds(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_none_one_and_a_hundred() {
        assert_eq!(percentile(&[], 99), 0);
        assert_eq!(percentile(&[7], 50), 7);
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&hundred, 50), percentile(&hundred, 99)), (51, 100));
    }

    #[test]
    fn the_drawing_moves_back_over_its_own_lines_and_leaves_the_notes() {
        let board = Arc::new(Board::new());
        board.say("the new server is stopped");
        board.error("client 3: gone".into());
        let mut display = Display::new(board);
        let look = display.look();
        let notes = display.new_notes();
        let first = display.drawing(&notes, &look);
        assert!(first.contains("the new server is stopped\n") && first.contains("errors \x1b[31m1"));
        assert_eq!(display.new_notes(), Vec::<String>::new());
        let second = display.drawing(&[], &look);
        assert!(second.starts_with("\x1b[5A\x1b[J"), "{second:?}");
    }
}
