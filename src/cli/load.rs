//! `waypost load`: users POST the records of a file, and the command prints how they were answered.

use std::{
    fs::File,
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use super::{
    output::{failed, misused, print},
    progress::Progress,
    read_records,
    run::stop_signal,
};
use crate::{
    api::client::Endpoint,
    load::{Load, Plan, Tally, report},
};

/// A longer wait is a mistake in the unit, and a far longer one overflows the clock.
const WAIT_MAX: Duration = Duration::from_hours(24);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost load --host http://127.0.0.1:8000
  waypost load cases.ndjson --host http://127.0.0.1:8000 --users 50 --repeat 10")]
pub struct Args {
    /// A JSON array of records, or NDJSON [default: the demo's 1,000]
    file: Option<PathBuf>,
    /// Post the records to this URL
    #[arg(long, value_name = "URL")]
    host: String,
    /// Users that post at the same time, each over one connection
    #[arg(
        long,
        default_value = "10",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    users: u32,
    /// Users that begin each second [default: all at once]
    #[arg(long, value_name = "N/s", value_parser = per_second)]
    spawn_rate: Option<f64>,
    /// Let each user wait between two records, such as 200ms..900ms
    #[arg(long, value_name = "MIN..MAX", value_parser = wait, conflicts_with = "rate")]
    wait: Option<Range<Duration>>,
    /// Post all records this many times
    #[arg(
        long,
        default_value = "1",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    repeat: u32,
    /// Post records at this rate however slow the answers are; a latency counts from the time its
    /// record was due
    #[arg(long, value_name = "N/s", value_parser = per_second)]
    rate: Option<f64>,
    /// Write a report with charts
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn per_second(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix("/s").unwrap_or(text).parse::<f64>();
    number
        .ok()
        .filter(|rate| (0.001..=1e7).contains(rate))
        .ok_or_else(|| "a number above 0, such as 100/s".into())
}

fn wait(text: &str) -> Result<Range<Duration>, String> {
    let (min, max) = text.split_once("..").unwrap_or((text, text));
    let duration = |text| humantime::parse_duration(text).map_err(|why| format!("{text:?}: {why}"));
    let range = duration(min)?..duration(max)?;
    if range.start > range.end {
        Err("the shorter wait comes first".into())
    } else if range.end > WAIT_MAX {
        Err(format!("at most {}", humantime::format_duration(WAIT_MAX)))
    } else {
        Ok(range)
    }
}

/// POSTs each record once per pass. Ctrl-C ends it early and prints the answers so far. Fails if a
/// record was refused or not POSTed.
pub async fn load(args: Args) -> Result<(), ExitCode> {
    let endpoint = Endpoint::with_public_roots(&args.host)
        .map_err(|why| misused(format_args!("--host: {why}")))?;
    let report = args.report.as_deref().map(open_report).transpose()?;
    let plan = Plan {
        passes: args.repeat as usize,
        spawn_rate: args.spawn_rate.unwrap_or(f64::INFINITY),
        wait: args.wait.unwrap_or_default(),
        rate: args.rate,
        ..Plan::new(read_records(args.file.as_deref())?, args.users as usize)
    };
    let load = Load::new(endpoint, plan);
    let total = load.total() as u64;
    let progress = Progress::new(total, "requests");
    let show = |tally: &Tally| {
        progress.note(format!(
            "{:.0}/s, {} failed",
            tally.per_second(),
            tally.failures
        ));
        progress.reached(tally.requests);
    };
    run(&load, show).await?;
    let tally = load.tally();
    show(&tally);
    progress.end();

    let printed = if args.json {
        print(tally.json())
    } else {
        let rows = tally.rows().into_iter();
        let rows = rows.map(|(name, value)| format!("{value:>9} {name}"));
        print(rows.collect::<Vec<_>>().join("\n"))
    };
    if let (Some(mut report), Some(path)) = (report, &args.report) {
        report
            .set_len(0)
            .and_then(|()| report.write_all(report::html(&tally, &args.host).as_bytes()))
            .map_err(|why| failed(format_args!("--report {}: {why}", path.display())))?;
    }
    printed?;
    if tally.requests < total {
        return Err(failed(format!(
            "stopped: {} of {total} records were posted",
            tally.requests
        )));
    }
    (tally.failures == 0).then_some(()).ok_or(ExitCode::FAILURE)
}

/// Opens the file of the report before the load, which may take long. An earlier report stays until
/// the new one is there.
fn open_report(path: &Path) -> Result<File, ExitCode> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    file.map_err(|why| misused(format_args!("--report {}: {why}", path.display())))
}

/// Runs `load` to its end, or until SIGINT or SIGTERM stops it.
async fn run(load: &Load, show: impl FnMut(&Tally)) -> Result<(), ExitCode> {
    let mut running = pin!(load.run(show));
    tokio::select! {
        () = &mut running => return Ok(()),
        stopped = stop_signal() => stopped?,
    }
    load.stop();
    running.await;
    Ok(())
}
