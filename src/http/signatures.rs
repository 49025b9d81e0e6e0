//! Whose requests are signed: see [`SigningKeys`].

use std::{path::Path, sync::Arc};

use actix_web::http::{
    StatusCode,
    header::{self, HeaderMap},
};

use super::problem::{Problem, ProblemKind};
use crate::{
    clock::system_unix_s,
    record::is_visible_ascii,
    secrets::{FileHealth, SigningKeys, WatchedFile, parse_timestamp},
};

/// The most characters of a webhook-id: it may stand for an Idempotency-Key.
const ID_MAX: usize = 255;

/// The keys of a file. Clones share them.
#[derive(Clone)]
pub struct Signatures(Arc<WatchedFile<SigningKeys>>);

/// A request that says that it is signed. Its body tells whether it is.
pub struct SignedRequest<'h> {
    keys: &'h Signatures,
    /// The sender's name for the request, the same each time that it is sent.
    pub id: &'h str,
    timestamp: &'h str,
    signatures: &'h str,
}

impl Signatures {
    /// Reads the file that `key` of the configuration names, and reads it again on this thread's
    /// runtime.
    ///
    /// # Errors
    /// If it cannot be read, has no key, or has a line that is none.
    pub fn open(key: &str, path: &Path) -> Result<Self, String> {
        let named = path.to_owned();
        let file = WatchedFile::open(key, [path], move |_| SigningKeys::read(&named))?;
        let file = Arc::new(file);
        actix_rt::spawn(Arc::clone(&file).keep_reading());
        Ok(Self(file))
    }

    pub fn health(&self) -> &Arc<FileHealth> {
        self.0.health()
    }

    /// Reads the headers of the signature, before the body is read.
    ///
    /// # Errors
    /// The problem of a request that has not each of them once, or is too old.
    pub fn begin<'h>(&'h self, headers: &'h HeaderMap) -> Result<SignedRequest<'h>, Problem> {
        let of = |name: &'static str| {
            only_text(headers, name).ok_or_else(|| {
                let why =
                    format!("Each request is signed: send one {name}, as Standard Webhooks has it");
                unsigned(why)
            })
        };
        let signed = SignedRequest {
            keys: self,
            id: of("webhook-id")?,
            timestamp: of("webhook-timestamp")?,
            signatures: of("webhook-signature")?,
        };
        if signed.id.len() > ID_MAX || !is_visible_ascii(signed.id) {
            return Err(unsigned(
                "A webhook-id is 1 to 255 visible ASCII characters",
            ));
        }
        parse_timestamp(signed.timestamp, system_unix_s())
            .map_err(|why| unsigned(why.to_string()))?;
        Ok(signed)
    }
}

impl SignedRequest<'_> {
    /// # Errors
    /// The problem of a request whose body, or another part, is not what a known key has signed.
    pub fn check(&self, body: &[u8]) -> Result<(), Problem> {
        let Self {
            keys,
            id,
            timestamp,
            signatures,
        } = self;
        // The body may have come slowly, and a key may have been removed meanwhile.
        let verified = keys
            .0
            .get()
            .verify(id, timestamp, signatures, body, system_unix_s());
        verified.map_err(|why| unsigned(why.to_string()))
    }
}

fn only_text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let mut lines = headers.get_all(name);
    let line = lines.next()?.to_str().ok()?;
    (lines.next().is_none() && !line.is_empty()).then_some(line)
}

fn unsigned(why: impl Into<String>) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, ProblemKind::Signature, why).with_header(
        header::WWW_AUTHENTICATE,
        "StandardWebhooks realm=\"waypost\"",
    )
}
