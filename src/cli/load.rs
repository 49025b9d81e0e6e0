//! `waypost load`: users POST the records of a file, and the command prints how they were answered.

mod limits;

use std::{
    fs::File,
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use humantime::{format_duration, format_rfc3339_seconds};

use self::limits::{FailuresMax, LoadLimits, failures_max};
use super::{
    header::{Header, header, header_map},
    output::{failed, misused, print},
    progress::Progress,
    read_records,
    run::stop_signal,
};
use crate::{
    api::client::Endpoint,
    build_info::BUILD_INFO,
    load::{Load, Plan, Tally, report},
};

/// A longer wait is a mistake in the unit, and a far longer one overflows the clock.
const WAIT_MAX: Duration = Duration::from_hours(24);
/// The headers that each request has of its own.
const OWN_HEADERS: [&str; 3] = ["content-length", "idempotency-key", "transfer-encoding"];

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost load --host http://127.0.0.1:8000
  waypost load cases.ndjson --host http://127.0.0.1:8000 --users 50 --repeat 10
  waypost load --host http://127.0.0.1:8000 --rate 500/s --duration 1min
  waypost load --host http://127.0.0.1:8000 --max-p99 50ms --max-failures 0.1%

In CI: the exit status is 1 if the load was stopped, more records failed than
--max-failures allows (none by default), or p99 is above --max-p99.")]
pub struct Args {
    /// A JSON array of records, or NDJSON [default: the demo's 1,000]
    file: Option<PathBuf>,
    /// Post the records to this URL
    #[arg(long, value_name = "URL")]
    host: String,
    /// A header of each request, as in 'Authorization: Bearer TOKEN'; may be given again
    #[arg(long = "header", value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<Header>,
    /// Users that post at the same time, each over one connection
    #[arg(
        long,
        default_value = "10",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536),
        help_heading = "Load"
    )]
    users: u32,
    /// Users that begin each second [default: all at once]
    #[arg(long, value_name = "N/s", value_parser = per_second, help_heading = "Load")]
    spawn_rate: Option<f64>,
    /// Let each user wait between two records, such as 200ms..900ms
    #[arg(
        long,
        value_name = "MIN..MAX",
        value_parser = wait,
        conflicts_with = "rate",
        help_heading = "Load"
    )]
    wait: Option<Range<Duration>>,
    /// Post records at this rate however slow the answers are; a latency counts from the time its
    /// record was due
    #[arg(long, value_name = "N/s", value_parser = per_second, help_heading = "Load")]
    rate: Option<f64>,
    /// Post all records this many times
    #[arg(
        long,
        default_value = "1",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = "Load"
    )]
    repeat: u32,
    /// Post the records again and again for this time, such as 30s
    #[arg(
        long,
        value_name = "TIME",
        value_parser = duration,
        conflicts_with = "repeat",
        help_heading = "Load"
    )]
    duration: Option<Duration>,
    /// Fail if p99 of the records that were taken is above this, such as 50ms
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Result")]
    max_p99: Option<Duration>,
    /// Fail only if more records fail than this: a number, or a part such as 0.1%
    #[arg(
        long,
        value_name = "N or N%",
        default_value = "0",
        value_parser = failures_max,
        help_heading = "Result"
    )]
    max_failures: FailuresMax,
    /// Write a report with charts
    #[arg(long, value_name = "FILE.html", help_heading = "Result")]
    report: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long, help_heading = "Result")]
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
        Err(format!("at most {}", format_duration(WAIT_MAX)))
    } else {
        Ok(range)
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|why| why.to_string())?;
    if time.is_zero() || time > WAIT_MAX {
        let max = format_duration(WAIT_MAX);
        return Err(format!("a time above 0 and up to {max}, such as 30s"));
    }
    Ok(time)
}

impl Args {
    fn endpoint(&self) -> Result<Endpoint, ExitCode> {
        let own = |header: &&Header| OWN_HEADERS.contains(&header.0.as_str());
        if let Some((name, _)) = self.headers.iter().find(own) {
            return Err(misused(format_args!(
                "--header: each request has its own {name}"
            )));
        }
        Endpoint::with_public_roots(&self.host)
            .map(|endpoint| endpoint.with_headers(header_map(&self.headers)))
            .map_err(|why| misused(format_args!("--host: {why}")))
    }

    /// How the load is run, for its report. Headers may be secrets, so only their names are told.
    fn parameters(&self, began: SystemTime) -> Vec<(&'static str, String)> {
        let or = |value: Option<String>, default: &str| value.unwrap_or_else(|| default.into());
        let per_second = |rate: f64| format!("{rate}/s");
        let file = self.file.as_ref();
        let names = self.headers.iter().map(|(name, _)| name.as_str());
        let times = match self.duration {
            Some(duration) => ("duration", format_duration(duration).to_string()),
            None => ("repeat", self.repeat.to_string()),
        };
        let wait = self.wait.as_ref();
        let wait = wait.map(|Range { start, end }| {
            format!("{}..{}", format_duration(*start), format_duration(*end))
        });
        vec![
            ("began", format_rfc3339_seconds(began).to_string()),
            ("waypost", BUILD_INFO.version.into()),
            ("host", self.host.clone()),
            (
                "records",
                or(
                    file.map(|file| file.display().to_string()),
                    "the demo's 1,000",
                ),
            ),
            ("users", self.users.to_string()),
            (
                "spawn rate",
                or(self.spawn_rate.map(per_second), "all at once"),
            ),
            ("wait", or(wait, "none")),
            (
                "rate",
                or(self.rate.map(per_second), "as fast as the answers"),
            ),
            times,
            (
                "headers",
                or(
                    names
                        .map(str::to_owned)
                        .reduce(|all, name| all + ", " + &name),
                    "none",
                ),
            ),
        ]
    }
}

/// POSTs each record once per pass. Ctrl-C ends it early and prints the answers so far. Fails if it
/// was stopped or a limit is broken; without other limits, if a record was refused.
pub async fn load(args: Args) -> Result<(), ExitCode> {
    let endpoint = args.endpoint()?;
    let report = args.report.as_deref().map(open_report).transpose()?;
    let plan = Plan {
        passes: args.repeat as usize,
        duration: args.duration,
        spawn_rate: args.spawn_rate.unwrap_or(f64::INFINITY),
        wait: args.wait.clone().unwrap_or_default(),
        rate: args.rate,
        ..Plan::new(read_records(args.file.as_deref())?, args.users as usize)
    };
    let load = Load::new(endpoint, plan);
    let began = SystemTime::now();
    let progress = match (load.total(), args.duration) {
        (None, Some(duration)) => Progress::new(duration.as_secs().max(1), "seconds"),
        (total, _) => Progress::new(total.unwrap_or_default() as u64, "requests"),
    };
    let show = |tally: &Tally| {
        progress.note(format!(
            "{:.0}/s, {} failed",
            tally.per_second(),
            tally.failures
        ));
        progress.reached(match args.duration {
            Some(duration) => tally.elapsed.min(duration).as_secs(),
            None => tally.requests,
        });
    };
    let is_stopped = run(&load, show).await?;
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
        let page = report::html(&tally, &args.host, &args.parameters(began));
        report
            .set_len(0)
            .and_then(|()| report.write_all(page.as_bytes()))
            .map_err(|why| failed(format_args!("--report {}: {why}", path.display())))?;
    }
    printed?;
    if is_stopped {
        return Err(failed(match load.total() {
            Some(total) => format!("stopped: {} of {total} records were posted", tally.requests),
            None => format!("stopped after {:.1} s", tally.elapsed.as_secs_f64()),
        }));
    }
    let limits = LoadLimits {
        p99: args.max_p99,
        failures: args.max_failures,
    };
    let broken = limits.broken(tally.requests, tally.failures, tally.p99());
    let mut outcome = Ok(());
    for limit in broken {
        outcome = Err(failed(limit));
    }
    outcome
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

/// Runs `load` to its end, or until SIGINT or SIGTERM stops it. Whether it was stopped.
async fn run(load: &Load, show: impl FnMut(&Tally)) -> Result<bool, ExitCode> {
    let mut running = pin!(load.run(show));
    tokio::select! {
        () = &mut running => return Ok(false),
        stopped = stop_signal() => stopped?,
    }
    load.stop();
    running.await;
    Ok(true)
}
