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
    filter::{LevelFilter, Targets},
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

impl Cli {
    /// Runs the command that was asked for.
    pub async fn execute(self) -> ExitCode {
        let quieter = match self.command {
            // Its own output says what happens.
            Some(Command::Demo(_) | Command::Check(_) | Command::Load(_)) => 1,
            _ => 0,
        };
        self.log(quieter);
        match self.command {
            None => run::run(run::Args::default()).await,
            Some(Command::Run(args)) => run::run(args).await,
            Some(Command::Demo(args)) => demo::demo(args).await,
            Some(Command::Check(args)) => check::check(args).await,
            Some(Command::Sink(args)) => sink::sink(args).await,
            Some(Command::Load(args)) => load::load(args).await,
            Some(Command::Dead(args)) => dead::dead(args).await,
        }
    }

    /// Logs go to the standard error. `RUST_LOG` overrides the flags.
    fn log(&self, quieter: u8) {
        const LEVELS: [LevelFilter; 5] =
            [LevelFilter::ERROR, LevelFilter::WARN, LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::TRACE];
        let level =
            (2 + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet + quieter)).min(LEVELS.len() - 1);
        // The libraries speak up for themselves only when asked.
        let ours = Targets::new().with_default(LevelFilter::WARN).with_target("waypost", LEVELS[level]);
        let asked = std::env::var("RUST_LOG").ok().filter(|asked| !asked.is_empty());
        let filter = asked.and_then(|asked| asked.parse().ok()).unwrap_or(ours);
        let colour =
            std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        // The filter has the only say of what is logged.
        let logs = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE);
        let logs = logs.with_writer(std::io::stderr).with_ansi(colour);
        match self.log_format {
            LogFormat::Text => logs.finish().with(filter).init(),
            LogFormat::Json => logs.json().flatten_event(true).finish().with(filter).init(),
        }
    }
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
    /// The configuration, or the exit status after each mistake was told on the standard error.
    pub fn load(&self) -> Result<Config, ExitCode> {
        let flag = |flag, section, name, value: &Option<String>| {
            value.clone().map(|value| Flag { flag, section, name, value })
        };
        let flags = [
            flag("--api", "api", "url", &self.api),
            flag("--listen", "ingest", "listen", &self.listen),
            flag("--admin", "admin", "listen", &self.admin),
            flag("--data", "spool", "dir", &self.data),
        ];
        let flags: Vec<_> = flags.into_iter().flatten().collect();
        // A variable that is not Unicode is none of ours.
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Config::load(self.config.as_deref(), &environment.collect(), &flags).map_err(|mistakes| {
            for mistake in mistakes {
                eprintln!("{mistake}");
            }
            ExitCode::from(USAGE)
        })
    }
}
