//! The way of the log to the standard error. A call that logs never waits, even if nobody reads the
//! lines: they wait in memory, and one thread writes them.
//!
//! - A log call never waits for the output. Lines stay whole and in their order.
//! - At most 1 MiB of lines waits. Lines beyond that are lost and counted. As soon as the output
//!   takes lines again, one line in the place of the lost ones says how many they were.
//! - An output that fails, such as a file on a full disk, is tried again: what it does not take is
//!   lost and counted in the same way.
//! - The end of the process waits until all that was logged is written, but not for long:
//!   [`LastLines`], [`flush`].
//! - A panic is a line of the log too: the hook of the standard library would write to an output
//!   that takes nothing.
//!
//! `tracing-appender` does not promise this: it counts the lines that find no room, and says nothing
//! in their place; it drops those that the output fails to take, uncounted; and what ends the
//! process by itself cannot wait for its thread.
#![expect(
    clippy::disallowed_types,
    reason = "a condition needs the plain lock; nothing else is locked under it"
)]

mod panics;

use std::{
    cell::RefCell,
    fs::File,
    io::{self, ErrorKind, Write},
    os::fd::AsFd as _,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use schemars::JsonSchema;
use serde::Serialize;
use tracing::warn;

/// Bytes of lines that may wait for the output: some thousand lines.
const WAITING_MAX: u64 = 1 << 20;
/// Memory that a quiet log keeps.
const KEPT_MAX: usize = 16 << 10;
/// The longest wait for the output.
const PATIENCE: Duration = Duration::from_millis(500);
/// The longer wait for a text for a person, which is the whole answer of a command.
const PERSON_PATIENCE: Duration = Duration::from_secs(2);
/// The wait for the thread on a machine that does not let it run.
const STARVED_MAX: Duration = Duration::from_secs(5);
/// The time between two tries of an output that fails, while no line comes.
const RETRY: Duration = Duration::from_secs(1);
/// The same for one that takes nothing now, and says so instead of waiting.
const RETRY_SOON: Duration = Duration::from_millis(20);
const THREAD: &str = "log";

/// The output of this process, once it logs.
static OUTPUT: OnceLock<Arc<LogOutput>> = OnceLock::new();

thread_local! {
    /// The line of the log's own thread, while it makes one.
    static OWN_LINE: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// The log in `GET /api/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LogStatus {
    /// Lines that the standard error did not take, since the start.
    pub lost: u64,
    /// Lines are being lost: the last ones that came found no room, or could not be written.
    pub refuses: bool,
}

/// The log of this process; one that has no lines loses none.
pub fn status() -> LogStatus {
    OUTPUT
        .get()
        .map(|output| output.status())
        .unwrap_or_default()
}

/// Starts the thread that writes to the standard error, and makes panics lines of the log.
///
/// # Errors
/// The system has no thread or descriptor left.
pub fn start() -> io::Result<(Arc<LogOutput>, LastLines)> {
    // A descriptor of its own: the lock of the standard one is held while a write waits.
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let output = Arc::new(LogOutput::default());
    let writer = Arc::clone(&output);
    thread::Builder::new()
        .name(THREAD.into())
        .spawn(move || writer.run(stderr, loss_line))?;
    let output = OUTPUT.get_or_init(|| output);
    panics::hook(Arc::clone(output));
    Ok((Arc::clone(output), LastLines))
}

/// Prints text for a person in its place among the lines of the log, and returns once it is written,
/// or the output has taken nothing for two seconds.
pub fn print(text: &str) {
    match OUTPUT.get() {
        Some(output) => output.print(text.as_bytes()),
        // Without a standard error, nobody can be told.
        None => drop(io::stderr().write_all(text.as_bytes())),
    }
}

/// Waits until all that was logged before is written, but for half a second at most, and not again
/// for an output that has taken nothing since such a wait.
pub fn flush() {
    if let Some(output) = OUTPUT.get() {
        output.flush(PATIENCE);
    }
}

/// Calls [`flush`] at its end, a panic included.
#[must_use]
pub struct LastLines;

impl Drop for LastLines {
    fn drop(&mut self) {
        flush();
    }
}

/// A line in the format of the log that says how many were lost. Empty if the level hides it.
fn loss_line(lines: u64) -> Vec<u8> {
    OWN_LINE.set(Some(Vec::new()));
    warn!(
        lines,
        "lines of the log were lost here: the standard error did not take them"
    );
    OWN_LINE.take().unwrap_or_default()
}

/// Takes lines from all threads, and gives them to the one that writes.
#[derive(Default)]
pub struct LogOutput {
    queue: Mutex<LineQueue>,
    arrived: Condvar,
    written: Condvar,
    lost: AtomicU64,
    /// Lost lines that the log has told.
    told: AtomicU64,
}

#[derive(Default)]
struct LineQueue {
    waiting: Vec<u8>,
    /// Lines that came after those that wait, and are lost.
    lost: u64,
    /// Bytes that ever waited.
    taken: u64,
    /// Those of them that do not concern the thread any more.
    ended: u64,
    /// `ended` when a wait of [`PATIENCE`] was in vain.
    waited_at: Option<u64>,
}

impl LogOutput {
    fn status(&self) -> LogStatus {
        let told = self.told.load(Relaxed);
        let lost = self.lost.load(Relaxed);
        LogStatus {
            lost,
            refuses: lost > told,
        }
    }

    fn lose(&self, lines: u64) {
        self.lost.fetch_add(lines, Relaxed);
    }

    /// Puts `line` at the end, or loses it.
    fn push(&self, line: &[u8]) {
        self.add(self.queue.lock(), line);
    }

    fn add(&self, mut queue: MutexGuard<'_, LineQueue>, line: &[u8]) {
        if queue.has_room(line.len()) {
            queue.put(line);
        } else {
            queue.lost += 1;
            self.lose(1);
        }
        drop(queue);
        self.arrived.notify_one();
    }

    /// See [`print`].
    fn print(&self, text: &[u8]) {
        let deadline = Instant::now() + PERSON_PATIENCE;
        let mut queue = self.queue.lock();
        while !queue.has_room(text.len()) && self.waits(&mut queue, deadline) {}
        self.add(queue, text);
        self.flush_until(deadline);
    }

    /// Waits until all that came before is written, but for `patience` at most.
    fn flush(&self, patience: Duration) {
        self.flush_until(Instant::now() + patience);
    }

    fn flush_until(&self, deadline: Instant) {
        let mut queue = self.queue.lock();
        let last = queue.taken;
        while queue.ended < last && self.waits(&mut queue, deadline) {}
    }

    /// Waits until something is written. Returns whether it may be worth to wait on: an output that
    /// took nothing in one wait is not waited for again until it takes something.
    fn waits(&self, queue: &mut MutexGuard<'_, LineQueue>, deadline: Instant) -> bool {
        if queue.waited_at == Some(queue.ended) {
            return false;
        }
        if !self.written.wait_until(queue, deadline).timed_out() {
            return true;
        }
        // A busy machine has not run the thread yet: the output was not asked.
        let is_asked = queue.taken - queue.ended > queue.waiting.len() as u64;
        if !is_asked && Instant::now() < deadline + STARVED_MAX {
            self.written.wait_for(queue, RETRY_SOON);
            return true;
        }
        queue.waited_at = Some(queue.ended);
        false
    }

    /// Writes what comes, for ever. `loss_line` makes the line that says how many were lost.
    fn run(&self, output: impl Write, loss_line: impl Fn(u64) -> Vec<u8>) {
        let mut output = LineWriter::new(output);
        let mut lines = Vec::new();
        // Lost lines that no line has told.
        let mut untold = 0;
        let told = |untold: &mut u64| {
            self.told.fetch_add(std::mem::take(untold), Relaxed);
        };
        let tell = |output: &mut LineWriter<_>, untold: &mut u64| {
            if *untold == 0 {
                return true;
            }
            let line = loss_line(*untold);
            let is_written = output.write(&line) == 0;
            if is_written && !line.is_empty() {
                told(untold);
            }
            is_written
        };
        loop {
            let lost = self.next(&mut lines, untold > 0);
            // The lines that could not be written came before these.
            let is_told = tell(&mut output, &mut untold);
            let unwritten = if is_told {
                output.write(&lines)
            } else {
                count_lines(&lines)
            };
            // If the level hides the loss, the next lines prove that the output takes them again.
            if is_told && unwritten == 0 && !lines.is_empty() {
                told(&mut untold);
            }
            self.lose(unwritten);
            untold += unwritten + lost;
            if is_told && unwritten == 0 {
                tell(&mut output, &mut untold);
            }
        }
    }

    /// Replaces `lines`, which are done, by those that wait, and returns how many were lost after
    /// them. Waits until there are any, but not for long if it `is_to_try_again`.
    fn next(&self, lines: &mut Vec<u8>, is_to_try_again: bool) -> u64 {
        let mut queue = self.queue.lock();
        queue.ended += lines.len() as u64;
        lines.clear();
        lines.shrink_to(KEPT_MAX);
        self.written.notify_all();
        while queue.waiting.is_empty() && queue.lost == 0 {
            if !is_to_try_again {
                self.arrived.wait(&mut queue);
            } else if self.arrived.wait_for(&mut queue, RETRY).timed_out() {
                break;
            }
        }
        std::mem::swap(lines, &mut queue.waiting);
        std::mem::take(&mut queue.lost)
    }
}

impl LineQueue {
    /// A line that comes after a lost one is lost too, so that the log has one gap.
    fn has_room(&self, bytes: usize) -> bool {
        // The lines that the thread has in hand wait too.
        let waiting = self.taken - self.ended;
        self.lost == 0 && waiting + bytes as u64 <= WAITING_MAX
    }

    fn put(&mut self, line: &[u8]) {
        self.waiting.extend_from_slice(line);
        self.taken += line.len() as u64;
    }
}

/// The subscriber writes each line as a whole.
impl Write for &LogOutput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // A thread that ends may have lost its own.
        let is_own = OWN_LINE.try_with(|own| match &mut *own.borrow_mut() {
            Some(own) => {
                own.extend_from_slice(line);
                true
            }
            None => false,
        });
        if !is_own.unwrap_or(false) {
            self.push(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes whole lines to an output that may fail in the midst of one.
struct LineWriter<W> {
    output: W,
    /// The output has a part of a line that is lost.
    is_torn: bool,
}

impl<W: Write> LineWriter<W> {
    fn new(output: W) -> Self {
        let is_torn = false;
        Self { output, is_torn }
    }

    /// Returns how many of the lines could not be written.
    fn write(&mut self, lines: &[u8]) -> u64 {
        if self.is_torn && !lines.is_empty() {
            if self.write_bytes(b"\n") == 0 {
                return count_lines(lines);
            }
            self.is_torn = false;
        }
        let written = self.write_bytes(lines);
        let (whole, rest) = lines.split_at(written);
        if !rest.is_empty() {
            self.is_torn = whole.last().is_some_and(|last| *last != b'\n');
        }
        count_lines(rest)
    }

    /// Returns how many bytes were written before it failed.
    fn write_bytes(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match self.output.write(&bytes[written..]) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(why) if why.kind() == ErrorKind::Interrupted => {}
                // Another program has set the terminal or pipe that both have to non-blocking.
                Err(why) if why.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_SOON),
                Err(_) => break,
            }
        }
        written
    }
}

fn count_lines(lines: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', lines).count() as u64
}

#[cfg(test)]
mod tests;
