//! The commands, one file each, and what they share.

mod admin;
pub mod check;
pub mod dead;
pub mod demo;
mod event_stream;
mod header;
pub mod lane;
pub mod load;
pub mod manual;
mod output;
mod progress;
pub mod run;
mod signals;
pub mod sink;
pub mod status;
pub mod tap;
pub mod top;

use std::{
    fs,
    io::{ErrorKind, IsTerminal as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use bytes::Bytes;
use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::{
    Layer as _,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

pub use self::output::failed;
use self::output::{misused, print, tell};
use crate::{
    build_info::BUILD_INFO,
    config::{Config, ConfigError, Flag},
    load::records,
    log::{self, LastLines},
};

/// The built-in records.
const TRAFFIC: &str = include_str!("../../traffic.json");
/// Exit status for bad usage or bad configuration.
const USAGE: u8 = 2;

/// Routes JSON records from HTTP through brokers or gRPC to an API, and loses none
#[derive(Debug, Parser)]
#[command(
    version,
    disable_version_flag = true,
    max_term_width = 100,
    after_help = "\
Examples:
  waypost demo                        # see it at work; nothing else is needed
  waypost check --config waypost.toml
  waypost run --config waypost.toml
  waypost status

Configuration: a file, WAYPOST_ variables and flags; `waypost check` prints
all of it. Exit status: 0 success, 1 failure, 2 bad usage or configuration."
)]
pub struct Cli {
    /// Log more: -v for debug, -vv for trace
    #[arg(
        short,
        long,
        global = true,
        display_order = 900,
        help_heading = "Log",
        action = clap::ArgAction::Count
    )]
    pub verbose: u8,
    /// Log less: -q for warnings, -qq for errors
    #[arg(
        short,
        long,
        global = true,
        display_order = 901,
        help_heading = "Log",
        action = clap::ArgAction::Count,
        conflicts_with = "verbose"
    )]
    pub quiet: u8,
    /// The format of the log
    #[arg(
        long,
        global = true,
        display_order = 902,
        help_heading = "Log",
        value_name = "FORMAT",
        value_enum,
        default_value_t = LogFormat::Text
    )]
    pub log_format: LogFormat,
    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,
    /// With --version: print JSON, with the commit and the features of the build
    #[arg(long, requires = "version")]
    pub json: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node; `waypost` without a command does the same
    #[command(after_help = "\
Examples:
  waypost run --config waypost.toml
  WAYPOST_LANES__NATS__URL=nats://127.0.0.1:4222 waypost run")]
    Run(NodeArgs),
    /// Show it at work: a node, an API and 1,000 records in one process
    Demo(demo::Args),
    /// Validate the configuration and print the effective one
    Check(check::Args),
    /// Serve a reference API that stores each record once
    Sink(sink::Args),
    /// Post records as many users, and print counts, rate and latencies
    Load(load::Args),
    /// Show what a running node does, and what is wrong
    Status(status::Args),
    /// Print records as they pass, one JSON line each
    Tap(tap::Args),
    /// Show running nodes live in the terminal, and give orders to their lanes
    Top(top::Args),
    /// List, pause, drain, resume or restart the lanes of a node, or set their weights
    Lane(lane::Args),
    /// List, replay or drop the dead letters of a node
    Dead(dead::Args),
    /// Print a script that completes commands and options in a shell
    Completions(manual::CompletionArgs),
    /// Print a manual page
    Man(manual::ManArgs),
}

impl Default for Command {
    fn default() -> Self {
        Self::Run(NodeArgs::default())
    }
}

impl Cli {
    /// Reads the command line.
    ///
    /// # Errors
    /// The exit status, after the mistake, the help or the version is printed.
    pub fn read() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|asked| {
            let is_mistake = asked.use_stderr();
            // All mistakes begin alike.
            if let Some(mistake) = asked.render().to_string().strip_prefix("error: ") {
                return misused(mistake.trim_end());
            }
            match asked.print() {
                Err(why) if !is_mistake && why.kind() != ErrorKind::BrokenPipe => {
                    failed(format!("the help cannot be written: {why}"))
                }
                _ if is_mistake => ExitCode::from(USAGE),
                _ => ExitCode::SUCCESS,
            }
        })
    }

    /// Runs the command that was asked for.
    pub fn execute(self) -> ExitCode {
        if self.version {
            return print_version(self.json).err().unwrap_or(ExitCode::SUCCESS);
        }
        // Its end is the last of all.
        let _last_lines = match self.log() {
            Ok(last_lines) => last_lines,
            Err(status) => return status,
        };
        let ended = actix_rt::System::new().block_on(async {
            match self.command.unwrap_or_default() {
                Command::Run(args) => run::run(args).await,
                Command::Demo(args) => demo::demo(args).await,
                Command::Check(args) => check::check(args).await,
                Command::Sink(args) => sink::sink(args).await,
                Command::Load(args) => load::load(args).await,
                Command::Status(args) => status::status(args).await,
                Command::Tap(args) => tap::tap(args).await,
                Command::Top(args) => top::top(args).await,
                Command::Lane(args) => lane::lane(args).await,
                Command::Dead(args) => dead::dead(args).await,
                Command::Completions(args) => manual::completions(&args),
                Command::Man(args) => manual::man(&args),
            }
        });
        ended.err().unwrap_or(ExitCode::SUCCESS)
    }

    /// Logs to the standard error. `RUST_LOG` overrides the flags.
    ///
    /// # Errors
    /// The exit status, after the reason is told.
    fn log(&self) -> Result<Option<LastLines>, ExitCode> {
        // Its lines would be in the midst of the screen.
        if matches!(self.command, Some(Command::Top(_))) && std::io::stderr().is_terminal() {
            return Ok(None);
        }
        let (output, last_lines) =
            log::start().map_err(|why| failed(format_args!("the log cannot be written: {why}")))?;
        let filter = std::env::var("RUST_LOG")
            .ok()
            .and_then(|directives| parse_filter(&directives))
            .unwrap_or_else(|| default_filter(self.level()));
        let colour = std::io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let lines = fmt::layer()
            .with_writer(output)
            .with_ansi(colour)
            // It would print to the standard error.
            .log_internal_errors(false);
        let lines = match self.log_format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        tracing_subscriber::registry()
            .with(lines)
            .with(filter)
            .init();
        Ok(Some(last_lines))
    }

    fn level(&self) -> LevelFilter {
        const LEVELS: [LevelFilter; 5] = [
            LevelFilter::ERROR,
            LevelFilter::WARN,
            LevelFilter::INFO,
            LevelFilter::DEBUG,
            LevelFilter::TRACE,
        ];
        let usual = match self.command {
            None | Some(Command::Run(_) | Command::Sink(_)) => 2,
            // These commands print their results, so they log warnings only.
            Some(_) => 1,
        };
        let level = (usual + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet));
        LEVELS[level.min(LEVELS.len() - 1)]
    }
}

fn print_version(as_json: bool) -> Result<(), ExitCode> {
    if as_json {
        return print(serde_json::to_string(&BUILD_INFO).map_err(failed)?);
    }
    print(format_args!("waypost {}", BUILD_INFO.version))
}

/// The broker clients. They log answers that we ask for, such as that a queue is missing, as errors.
const SILENT: [&str; 3] = ["async_nats", "google_cloud", "lapin"];

/// Waypost's own lines from `level` on, and warnings of libraries. The broker clients are silent:
/// the lane reports each error that they return.
fn default_filter(level: LevelFilter) -> Targets {
    Targets::new()
        .with_default(LevelFilter::WARN.min(level))
        .with_target("waypost", level)
        // Its errors are bad requests, which `http` logs with the client's address.
        .with_target("actix_http::h1", LevelFilter::OFF)
        .with_targets(SILENT.map(|client| (client, LevelFilter::OFF)))
}

/// The filter of directives such as `warn,waypost=debug`, or `None` if they are not valid. A broker
/// client that no directive names stays silent.
fn parse_filter(directives: &str) -> Option<Targets> {
    let parts: Vec<_> = directives
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect();
    // We log no spans, so a filter of spans is not valid.
    if parts.is_empty() || directives.contains('[') {
        return None;
    }
    let asked: Targets = parts.join(",").parse().ok()?;
    let unnamed = SILENT.into_iter().filter(|client| {
        let names_it = |part: &&str| part.starts_with(client);
        !parts.iter().any(names_it)
    });
    Some(asked.with_targets(unnamed.map(|client| (client, LevelFilter::OFF))))
}

/// The records of `file`, or the built-in ones.
fn read_records(file: Option<&Path>) -> Result<Vec<Bytes>, ExitCode> {
    let Some(file) = file else {
        return records(TRAFFIC).map_err(failed);
    };
    let text = fs::read_to_string(file).map_err(|why| why.to_string());
    text.and_then(|text| records(&text))
        .map_err(|why| misused(format!("{}: {why}", file.display())))
}

/// The sources of a node's configuration. Flags override the environment, and the environment
/// overrides the file.
#[derive(Debug, Default, clap::Args)]
pub struct NodeArgs {
    /// Read the configuration from this TOML file
    #[arg(long, value_name = "FILE", help_heading = "Node")]
    pub config: Option<PathBuf>,
    /// Post records to this API [default: port 5000 of this machine]
    #[arg(long, value_name = "URL", help_heading = "Node")]
    pub api: Option<String>,
    /// Take records at this address [default: 0.0.0.0:8000]
    #[arg(long, value_name = "ADDR", help_heading = "Node")]
    pub listen: Option<String>,
    /// Serve health, status and the admin API here [default: 127.0.0.1:8001]
    #[arg(long, value_name = "ADDR", help_heading = "Node")]
    pub admin: Option<String>,
    /// Keep the node's data in this folder [default: data]
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    pub data: Option<String>,
}

impl NodeArgs {
    /// The configuration, or the exit status after each mistake is on the standard error.
    fn load(&self) -> Result<Config, ExitCode> {
        self.read().map_err(|errors| {
            for error in errors {
                tell(error);
            }
            ExitCode::from(USAGE)
        })
    }

    /// The configuration, or all mistakes in it.
    fn read(&self) -> Result<Config, Vec<ConfigError>> {
        let flag = |flag, key, value: &Option<String>| {
            let value = value.clone()?;
            Some(Flag { flag, key, value })
        };
        let flags = [
            flag("--api", "api.url", &self.api),
            flag("--listen", "ingest.listen", &self.listen),
            flag("--admin", "admin.listen", &self.admin),
            flag("--data", "spool.dir", &self.data),
        ];
        let flags: Vec<_> = flags.into_iter().flatten().collect();
        // All our variables are Unicode.
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        Config::load(self.config.as_deref(), &environment.collect(), &flags)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use tracing::Level;

    use super::*;

    /// The commands, each with its parents before it.
    fn all_commands() -> Vec<clap::Command> {
        fn collect(command: &clap::Command, found: &mut Vec<clap::Command>) {
            for child in command.get_subcommands() {
                if child.get_name() != "help" {
                    found.push(child.clone());
                    collect(child, found);
                }
            }
        }
        let mut program = Cli::command();
        program.build();
        let mut found = vec![program.clone()];
        collect(&program, &mut found);
        found
    }

    /// The words of a command line, up to a comment, a pipe or a file.
    fn words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (at, part) in line.split('\'').enumerate() {
            if at % 2 == 1 {
                words.push(part.to_owned());
                continue;
            }
            let end = part.find(['#', '|', '>']).unwrap_or(part.len());
            words.extend(part[..end].split_whitespace().map(str::to_owned));
        }
        let start = words.iter().position(|word| word == "waypost");
        words.split_off(start.expect("the program is called"))
    }

    #[test]
    fn each_help_has_examples_which_are_command_lines() {
        for command in all_commands() {
            let name = command.get_bin_name().unwrap_or("waypost").to_owned();
            let help = command.get_after_help().map(ToString::to_string);
            let help = help.unwrap_or_default();
            let lines = help.lines().skip_while(|line| !line.starts_with("Example"));
            let lines = lines.skip(1).take_while(|line| line.starts_with("  "));
            let lines: Vec<_> = lines.collect();
            assert!(!lines.is_empty(), "{name} has no example: {help:?}");
            for line in lines {
                let parsed = Cli::try_parse_from(words(line));
                assert!(parsed.is_ok(), "{name}: {line}: {}", parsed.unwrap_err());
                assert!(line.contains(&name), "{name}: {line}");
            }
        }
    }

    #[test]
    fn a_help_fits_a_terminal_of_80_columns_and_explains_each_option() {
        for command in all_commands() {
            let name = command.get_bin_name().unwrap_or("waypost").to_owned();
            for option in command.get_arguments() {
                assert!(option.get_help().is_some(), "{name}: {option}");
                // A heading holds for the options after it, too, unless each has its own.
                let is_of_node = option.get_help_heading() == Some("Node");
                assert!(
                    !is_of_node || option.get_id() != "connect",
                    "{name}: {option}"
                );
            }
            let help = command.term_width(80).render_long_help().to_string();
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "{name}: {line}");
            }
        }
    }

    #[test]
    fn rust_log_is_read_as_a_list_of_directives() {
        for (text, ours, others) in [
            ("info,", Level::INFO, Level::INFO),
            ("error, waypost=debug", Level::DEBUG, Level::ERROR),
            ("warn,waypost::node=trace", Level::TRACE, Level::WARN),
        ] {
            let asked = parse_filter(text).expect("directives");
            let most = |target: &str| {
                let levels = [
                    Level::TRACE,
                    Level::DEBUG,
                    Level::INFO,
                    Level::WARN,
                    Level::ERROR,
                ];
                levels
                    .into_iter()
                    .find(|level| asked.would_enable(target, level))
            };
            assert_eq!(
                (most("waypost::node"), most("h2::client")),
                (Some(ours), Some(others)),
                "{text}"
            );
        }
        for nothing in ["", " ,", "waypost[span]=debug", "waypost=loud"] {
            assert!(parse_filter(nothing).is_none(), "{nothing}");
        }
    }

    #[test]
    fn broker_clients_are_silent_unless_rust_log_asks_for_them() {
        let filter = default_filter(LevelFilter::TRACE);
        for target in [
            "actix_http::h1::dispatcher",
            "lapin::channels",
            "async_nats",
            "google_cloud_pubsub::client",
        ] {
            assert!(!filter.would_enable(target, &Level::ERROR), "{target}");
        }
        assert!(filter.would_enable("waypost::node", &Level::TRACE));
        assert!(filter.would_enable("h2::client", &Level::WARN));
        assert!(!filter.would_enable("h2::client", &Level::INFO));
        let quiet = default_filter(LevelFilter::ERROR);
        assert!(!quiet.would_enable("h2::client", &Level::WARN));
        for (directives, is_silent) in [
            ("info", true),
            ("trace,async_nats=debug", true),
            ("error,lapin=debug", false),
            ("error,lapin::channels=debug", false),
        ] {
            let asked = parse_filter(directives).expect("directives");
            let is_heard = asked.would_enable("lapin::channels", &Level::ERROR);
            assert_eq!(is_heard, !is_silent, "{directives}");
        }
    }
}
