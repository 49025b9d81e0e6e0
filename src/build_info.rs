//! The build that this program is.

use serde::Serialize;

/// The build, as `waypost --version --json` prints it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BuildInfo {
    pub version: &'static str,
    /// The variable `WAYPOST_COMMIT` of the build; null if it was not set, or is empty.
    pub commit: Option<&'static str>,
    /// The optional features that are compiled in.
    pub features: &'static [&'static str],
}

pub const BUILD_INFO: BuildInfo = BuildInfo {
    version: env!("CARGO_PKG_VERSION"),
    commit: match option_env!("WAYPOST_COMMIT") {
        Some(commit) if !commit.is_empty() => Some(commit),
        _ => None,
    },
    features: if cfg!(feature = "failpoints") {
        &["failpoints"]
    } else {
        &[]
    },
};
