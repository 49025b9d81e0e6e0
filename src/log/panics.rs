//! Panics as lines of the log.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io::Write as _,
    panic::{self, PanicHookInfo},
    sync::Arc,
    thread,
};

use tracing::{Level, enabled, error};

use super::{LogOutput, PATIENCE};

/// From now on, a panic is logged, and not printed.
pub(super) fn hook(output: Arc<LogOutput>) {
    panic::set_hook(Box::new(move |info| {
        tell(&output, info);
        // It may end the process.
        output.flush(PATIENCE);
    }));
}

fn tell(output: &LogOutput, info: &PanicHookInfo<'_>) {
    let reason = info.payload_as_str().unwrap_or("no message");
    let location = info.location().map(ToString::to_string);
    let location = location.as_deref().unwrap_or("unknown");
    let thread = thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    // `RUST_BACKTRACE` asks for one.
    let backtrace = Backtrace::capture();
    if !enabled!(Level::ERROR) {
        // A panic is told even if the log's level hides it.
        let line = format!("thread {thread} panicked at {location}: {reason}\n");
        let mut output = output;
        output.write_all(line.as_bytes()).ok();
    } else if backtrace.status() == BacktraceStatus::Captured {
        error!(reason, thread, location, %backtrace, "panicked");
    } else {
        error!(reason, thread, location, "panicked");
    }
}
