//! `waypost load`: users POST the records of a file, and the command prints how they were answered.

use std::{fs, io, ops::Range, path::PathBuf, pin::pin, process::ExitCode, time::Duration};

use super::{USAGE, demo::TRAFFIC, progress::Progress, run::stop_signal};
use crate::{
    api::client::Endpoint,
    load::{Load, Plan, Tally, records, report},
};

/// A longer wait is a mistake in the unit, and a far longer one overflows the clock.
const WAIT_MAX: Duration = Duration::from_hours(24);

#[derive(Debug, clap::Args)]
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
pub async fn load(args: Args) -> ExitCode {
    let (endpoint, plan) = match plan(&args) {
        Ok(plan) => plan,
        Err(why) => {
            eprintln!("waypost: {why}");
            return ExitCode::from(USAGE);
        }
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
    if let Err(why) = run(&load, show).await {
        eprintln!("waypost: {why}");
        return ExitCode::FAILURE;
    }
    let tally = load.tally();
    show(&tally);
    progress.end();

    if args.json {
        println!("{}", tally.json());
    } else {
        print(&tally);
    }
    if let Some(file) = &args.report
        && let Err(why) = fs::write(file, report::html(&tally, &args.host))
    {
        eprintln!("waypost: {}: {why}", file.display());
        return ExitCode::FAILURE;
    }
    if tally.requests < total {
        eprintln!(
            "waypost: stopped: {} of {total} records were posted",
            tally.requests
        );
    }
    if tally.failures == 0 && tally.requests == total {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs `load` to its end, or until SIGINT or SIGTERM stops it.
async fn run(load: &Load, show: impl FnMut(&Tally)) -> io::Result<()> {
    let mut running = pin!(load.run(show));
    tokio::select! {
        () = &mut running => return Ok(()),
        stopped = stop_signal() => stopped?,
    }
    load.stop();
    running.await;
    Ok(())
}

fn plan(args: &Args) -> Result<(Endpoint, Plan), String> {
    let text = match &args.file {
        Some(file) => {
            fs::read_to_string(file).map_err(|why| format!("{}: {why}", file.display()))?
        }
        None => TRAFFIC.to_owned(),
    };
    let name = args
        .file
        .as_ref()
        .map_or_else(|| "records".into(), |file| file.display().to_string());
    let plan = Plan {
        records: records(&text).map_err(|why| format!("{name}: {why}"))?,
        passes: args.repeat as usize,
        users: args.users as usize,
        spawn_rate: args.spawn_rate.unwrap_or(f64::INFINITY),
        wait: args.wait.clone().unwrap_or_default(),
        rate: args.rate,
        keyed: true,
        watch: None,
    };
    Ok((Endpoint::with_public_roots(&args.host)?, plan))
}

fn print(tally: &Tally) {
    println!(
        "{:>9} {:>8} {:>11} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "requests", "failures", "requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"
    );
    println!(
        "{:>9} {:>8} {:>11.1} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>8.2}",
        tally.requests,
        tally.failures,
        tally.per_second(),
        tally.latency_ms(0.5),
        tally.latency_ms(0.9),
        tally.latency_ms(0.99),
        tally.latency_ms(0.999),
        tally.latency_max_ms()
    );
    for (kind, count) in &tally.kinds {
        println!("{count:>9} {kind}");
    }
}
