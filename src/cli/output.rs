//! The output of the commands. No write panics: the reader of a pipe may have closed it, and the disk
//! behind a file may be full.

use std::{
    fmt::Display,
    io::{self, ErrorKind, Write as _},
    ops::ControlFlow,
    process::ExitCode,
};

use terminal_size::Width;

use crate::log;

/// Prints a result to the standard output. A reader that has closed it wants no more, so that is no
/// failure.
pub fn print(result: impl Display) -> Result<(), ExitCode> {
    print_bytes(format!("{result}\n").as_bytes())
}

/// Prints a result as it is, like [`print`].
pub fn print_bytes(result: &[u8]) -> Result<(), ExitCode> {
    write(result).map(|_| ())
}

/// Prints one of many lines, and says whether there is still a reader.
pub fn print_line(line: &str) -> Result<ControlFlow<()>, ExitCode> {
    write(format!("{line}\n").as_bytes())
}

fn write(result: &[u8]) -> Result<ControlFlow<()>, ExitCode> {
    let mut output = io::stdout().lock();
    let printed = output.write_all(result).and_then(|()| output.flush());
    match printed {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(why) if why.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(why) => Err(failed(format!("the result cannot be written: {why}"))),
    }
}

/// The width of the terminal that the standard output is, if it is one.
pub fn width() -> Option<usize> {
    let (Width(width), _) = terminal_size::terminal_size_of(io::stdout())?;
    Some(width.into())
}

/// Prints a line for a person to the standard error: see [`log::print`].
pub fn tell(line: impl Display) {
    log::print(&format!("{line}\n"));
}

/// Tells why a command fails. Returns its exit status.
pub fn failed(why: impl Display) -> ExitCode {
    tell(format_args!("waypost: {why}"));
    ExitCode::FAILURE
}

/// Tells the mistake in a command line. Returns the exit status.
pub fn misused(why: impl Display) -> ExitCode {
    tell(format_args!("waypost: {why}"));
    ExitCode::from(super::USAGE)
}
