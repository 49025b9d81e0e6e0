//! The commands, one file each, and what they share.

pub mod check;
pub mod dead;
pub mod demo;
pub mod load;
mod progress;
pub mod run;
pub mod sink;

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::{
    Layer as _,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::config::{Config, Flag};

/// Routes JSON records from HTTP through NATS, RabbitMQ, Google Pub/Sub or gRPC to an API, and loses none.
#[derive(Debug, Parser)]
#[command(version, term_width = 80)]
pub struct Cli {
    /// Log more: -v for debug, -vv for trace
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Log less: -q for warnings, -qq for errors
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "verbose")]
    pub quiet: u8,
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
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
    /// Run a node (what `waypost` alone does, with its defaults)
    Run(run::Args),
    /// See it work: a node, an API and 1,000 records in one process, with nothing to install
    Demo(demo::Args),
    /// Validate the configuration and print the effective one
    Check(check::Args),
    /// Serve a reference API that keeps each record once
    Sink(sink::Args),
    /// Post records as many users would, and tell how they were answered
    Load(load::Args),
    /// List, replay or drop the dead letters of a node
    Dead(dead::Args),
}

impl Default for Command {
    fn default() -> Self {
        Self::Run(run::Args::default())
    }
}

impl Cli {
    /// Runs the command that was asked for. It is not async: what the program polls by itself is compiled into it once more, which
    /// made it a fifth larger.
    #[must_use]
    pub fn execute(self) -> ExitCode {
        let quieter = match self.command {
            // Its own output says what happens.
            Some(Command::Demo(_) | Command::Check(_) | Command::Load(_)) => 1,
            _ => 0,
        };
        self.log(quieter);
        match self.command.unwrap_or_default() {
            Command::Run(args) => on_actors(run::run(args)),
            Command::Demo(args) => on_actors(demo::demo(args)),
            Command::Check(args) => on_actors(check::check(args)),
            Command::Sink(args) => on_actors(sink::sink(args)),
            Command::Load(args) => on_actors(load::load(args)),
            Command::Dead(args) => on_actors(dead::dead(args)),
        }
    }

    /// Logs go to the standard error. `RUST_LOG` overrides the flags.
    fn log(&self, quieter: u8) {
        const LEVELS: [LevelFilter; 5] = [
            LevelFilter::ERROR,
            LevelFilter::WARN,
            LevelFilter::INFO,
            LevelFilter::DEBUG,
            LevelFilter::TRACE,
        ];
        let level = (2 + usize::from(self.verbose))
            .saturating_sub(usize::from(self.quiet + quieter))
            .min(LEVELS.len() - 1);
        let asked = std::env::var("RUST_LOG")
            .ok()
            .and_then(|asked| asked_for(&asked));
        // The libraries speak up for themselves only when asked.
        let ours = || {
            Targets::new()
                .with_default(LevelFilter::WARN)
                .with_target("waypost", LEVELS[level])
        };
        let colour = std::io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(colour);
        let lines = match self.log_format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        tracing_subscriber::registry()
            .with(lines)
            .with(asked.unwrap_or_else(ours))
            .init();
    }
}

fn on_actors(work: impl Future<Output = ExitCode>) -> ExitCode {
    actix_rt::System::new().block_on(work)
}

/// What a text like `warn,waypost=debug` asks to be logged, if it is one that asks for something.
fn asked_for(text: &str) -> Option<Targets> {
    let parts: Vec<_> = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect();
    // Of spans and their fields, which no line of ours has, nothing can be asked.
    if parts.is_empty() || text.contains('[') {
        return None;
    }
    parts.join(",").parse().ok()
}

/// Exit status for bad usage or bad configuration.
pub const USAGE: u8 = 2;

/// Where a node's configuration comes from. Flags override the environment, the environment overrides the file.
#[derive(Debug, Default, clap::Args)]
pub struct NodeArgs {
    /// A TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where records go [default: port 5000 of this machine]
    #[arg(long, value_name = "URL")]
    pub api: Option<String>,
    /// Where to take records [default: 0.0.0.0:8000]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Where to serve health, status and orders [default: 127.0.0.1:8001]
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,
    /// The durable folder of the node [default: data]
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
}

impl NodeArgs {
    /// The configuration, or the exit status after each mistake is on the standard error.
    pub fn load(&self) -> Result<Config, ExitCode> {
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
        Config::load(self.config.as_deref(), &environment.collect(), &flags).map_err(|errors| {
            for error in errors {
                eprintln!("{error}");
            }
            ExitCode::from(USAGE)
        })
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn what_rust_log_asks_for_is_what_it_says() {
        for (text, ours, others) in [
            ("info,", Level::INFO, Level::INFO),
            ("error, waypost=debug", Level::DEBUG, Level::ERROR),
            ("warn,waypost::node=trace", Level::TRACE, Level::WARN),
        ] {
            let asked = asked_for(text).expect("it asks for something");
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
            assert!(asked_for(nothing).is_none(), "{nothing}");
        }
    }
}
