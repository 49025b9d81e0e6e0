//! Files with passwords, tokens, keys and certificates.

use std::{fs, io, path::Path};

use tokio::task::spawn_blocking;

use super::TransportError;

/// Reads a text file without blocking the event loop.
///
/// # Errors
/// If the file cannot be read or is not UTF-8. The error names the file.
pub(super) async fn read_secret(path: &Path) -> Result<String, TransportError> {
    let owned = path.to_owned();
    spawn_blocking(move || fs::read_to_string(owned))
        .await
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
        .map_err(|why| TransportError::Connect(format!("{}: {why}", path.display())))
}
