//! `waypost completions` and `waypost man`: made from the definition of the command line, so they
//! have each command and option that the program has.

use std::process::ExitCode;

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{
    Cli,
    output::{failed, misused, print_bytes},
};

const NAME: &str = "waypost";

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost completions bash > ~/.local/share/bash-completion/completions/waypost
  waypost completions zsh > ~/.zfunc/_waypost
  waypost completions fish > ~/.config/fish/completions/waypost.fish")]
pub struct CompletionArgs {
    /// The shell that reads the script
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost man | man -l -
  waypost man dead list > waypost-dead-list.1")]
pub struct ManArgs {
    /// The command; without one, the page is of the program
    #[arg(value_name = "COMMAND")]
    command: Vec<String>,
}

/// Prints the script that completes commands and options in a shell.
pub fn completions(args: &CompletionArgs) -> Result<(), ExitCode> {
    print_bytes(&script(args.shell))
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    script
}

/// Prints the manual page of the program, or of one command.
pub fn man(args: &ManArgs) -> Result<(), ExitCode> {
    let mut program = Cli::command();
    // Gives each command the options that all have, and its full name.
    program.build();
    let mut command = &program;
    for name in &args.command {
        command = command.find_subcommand(name).ok_or_else(|| {
            let asked = args.command.join(" ");
            misused(format_args!("COMMAND: there is no command {asked:?}"))
        })?;
    }
    print_bytes(&page(command).map_err(failed)?)
}

fn page(command: &Command) -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn each_shell_completes_each_command_and_option() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell)).unwrap();
            for wanted in [
                "completions",
                "weight",
                "replay",
                "spawn-rate",
                "log-format",
            ] {
                assert!(script.contains(wanted), "{shell}: {wanted}");
            }
        }
    }

    #[test]
    fn each_command_has_a_page_with_its_options() {
        fn check(command: &Command) {
            let page = String::from_utf8(page(command).unwrap()).unwrap();
            for option in command
                .get_arguments()
                .filter(|option| !option.is_hide_set())
            {
                let Some(long) = option.get_long() else {
                    continue;
                };
                let long = long.replace('-', "\\-");
                assert!(
                    page.contains(&long),
                    "{}: {long}\n{page}",
                    command.get_name()
                );
            }
            command.get_subcommands().for_each(check);
        }
        let mut program = Cli::command();
        program.build();
        check(&program);
    }
}
