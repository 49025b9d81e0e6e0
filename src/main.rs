//! The `waypost` program: parses the command line, runs one command, and exits with its status.

use std::process::ExitCode;

use waypost::cli::{Cli, failed};

/// A record is a dozen small allocations that one thread makes and another frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Before any TLS: the broker clients agree on one provider.
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        return failed("a TLS provider was installed before ours");
    }
    #[cfg(feature = "failpoints")]
    let _faults = fail::FailScenario::setup();
    Cli::read().map_or_else(|status| status, Cli::execute)
}
