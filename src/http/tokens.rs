//! Bearer tokens (RFC 6750): a file has one a line, and each lets its owner send records.
//!
//! The file is read again every second, so a token that is added or removed counts soon after. A
//! file that cannot be read changes nothing: the last tokens that were read stay.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use actix_web::http::{
    StatusCode,
    header::{self, HeaderMap},
};
use parking_lot::{Mutex, RwLock};
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use serde::Serialize;
use subtle::{Choice, ConstantTimeEq as _};
use tokio::time::sleep;
use tracing::{error, info};

use super::problem::{Problem, ProblemKind};

/// A removed token is refused within two of these.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// A token as it is kept: the time of a comparison tells nothing about it.
type TokenDigest = [u8; SHA256_OUTPUT_LEN];

/// The tokens of a file. Clones share them.
#[derive(Clone)]
pub struct Tokens(Arc<TokenFile>);

struct TokenFile {
    path: PathBuf,
    digests: RwLock<Arc<[TokenDigest]>>,
    /// Why the file could not be read the last time.
    last_error: Mutex<Option<String>>,
}

/// The tokens in `/api/status`.
#[derive(Debug, Serialize)]
pub struct TokensStatus {
    /// Tokens that are taken.
    pub count: usize,
    /// Why the file could not be read the last time; null if it was.
    pub last_error: Option<String>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("Tokens").field(&self.0.path).finish()
    }
}

impl Tokens {
    /// Reads the file: a token a line. White space around a token and empty lines do not count.
    ///
    /// # Errors
    /// If it cannot be read, has no token, or has one that no client can send.
    pub fn open(path: &Path) -> Result<Self, String> {
        let digests = read(path)?;
        if digests.is_empty() {
            return Err(format!("{} holds no token", path.display()));
        }
        Ok(Self(Arc::new(TokenFile {
            path: path.to_owned(),
            digests: RwLock::new(digests),
            last_error: Mutex::default(),
        })))
    }

    /// Reads the file again and again.
    pub async fn keep_reading(self) {
        loop {
            sleep(READ_AGAIN).await;
            let path = self.0.path.clone();
            let reading = tokio::task::spawn_blocking(move || read(&path));
            if let Ok(read) = reading.await {
                self.update(read);
            }
        }
    }

    fn update(&self, read: Result<Arc<[TokenDigest]>, String>) {
        let mut last_error = self.0.last_error.lock();
        match read {
            Ok(digests) => {
                let count = digests.len();
                let before = std::mem::replace(&mut *self.0.digests.write(), digests);
                if last_error.take().is_some() || before != *self.0.digests.read() {
                    info!(count, "the tokens of ingest were read again");
                }
            }
            // Once for each reason.
            Err(why) if last_error.as_ref() != Some(&why) => {
                error!(%why, "the tokens of ingest cannot be read; the last ones stay");
                *last_error = Some(why);
            }
            Err(_) => {}
        }
    }

    /// # Errors
    /// The problem of a request that presents none of the tokens.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let mut lines = headers.get_all(header::AUTHORIZATION);
        let Some(line) = lines.next() else {
            return Err(unauthorized(
                "Bearer realm=\"waypost\"",
                "This node takes records with a token: send Authorization: Bearer TOKEN",
            ));
        };
        let token = bearer(line.as_bytes()).filter(|_| lines.next().is_none());
        if token.is_some_and(|token| self.has(token)) {
            return Ok(());
        }
        Err(unauthorized(
            "Bearer realm=\"waypost\", error=\"invalid_token\"",
            "The Authorization has no token that this node knows",
        ))
    }

    fn has(&self, token: &[u8]) -> bool {
        let presented = digest_of(token);
        let digests = Arc::clone(&self.0.digests.read());
        let equals = digests.iter().map(|known| known.ct_eq(&presented));
        equals.fold(Choice::from(0), |any, this| any | this).into()
    }

    pub fn status(&self) -> TokensStatus {
        TokensStatus {
            count: self.0.digests.read().len(),
            last_error: self.0.last_error.lock().clone(),
        }
    }
}

fn unauthorized(challenge: &str, detail: &str) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, ProblemKind::Token, detail)
        .with_header(header::WWW_AUTHENTICATE, challenge)
}

/// The token of the scheme `Bearer`, whose name is not case-sensitive (RFC 9110, 11.1).
fn bearer(line: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = line.split_at_checked(b"Bearer ".len())?;
    let is_bearer = scheme.eq_ignore_ascii_case(b"Bearer ");
    is_bearer.then(|| token.trim_ascii())
}

fn digest_of(token: &[u8]) -> TokenDigest {
    let mut bytes = TokenDigest::default();
    bytes.copy_from_slice(digest(&SHA256, token).as_ref());
    bytes
}

fn read(path: &Path) -> Result<Arc<[TokenDigest]>, String> {
    let text = std::fs::read(path).map_err(|why| format!("{}: {why}", path.display()))?;
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let tokens = lines.enumerate().filter(|(_, token)| !token.is_empty());
    let digests = tokens.map(|(at, token)| {
        if token.iter().all(u8::is_ascii_graphic) {
            Ok(digest_of(token))
        } else {
            // The token itself is a secret.
            Err(format!(
                "{}:{}: a token has visible ASCII characters only",
                path.display(),
                at + 1
            ))
        }
    });
    digests.collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use actix_web::{ResponseError as _, http::header::HeaderValue};
    use tempfile::NamedTempFile;

    use super::*;

    fn file(content: &str) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file
    }

    fn headers(lines: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::AUTHORIZATION, HeaderValue::from_str(line).unwrap());
        }
        headers
    }

    #[test]
    fn only_a_token_of_the_file_is_taken() {
        let file = file("first\n\n  second \r\n# third");
        let why = Tokens::open(file.path()).unwrap_err();
        assert!(
            why.ends_with(":4: a token has visible ASCII characters only"),
            "{why}"
        );
        fs::write(file.path(), "first\n\n  second \r\nthird").unwrap();
        let tokens = Tokens::open(file.path()).unwrap();
        assert_eq!(tokens.status().count, 3);
        for line in ["Bearer first", "bearer second", "BEARER  third "] {
            assert!(tokens.check(&headers(&[line])).is_ok(), "{line}");
        }
        for lines in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &["Bearer fourth"],
            &["Bearer firs"],
            &["Bearer firstt"],
            &["Bearer First"],
            &["Bearer first second"],
            &["Basic first"],
            &["first"],
            &["Bearer first", "Bearer first"],
            &["Bearer fourth", "Bearer first"],
        ] {
            let problem = tokens.check(&headers(lines)).unwrap_err();
            assert_eq!(problem.status_code(), StatusCode::UNAUTHORIZED, "{lines:?}");
        }
        assert!(!format!("{tokens:?}").contains("first"));
    }

    #[test]
    fn a_file_without_a_token_is_no_file_to_start_with() {
        for content in ["", "\n \r\n"] {
            assert!(Tokens::open(file(content).path()).is_err(), "{content:?}");
        }
        assert!(Tokens::open(Path::new("/nowhere/tokens")).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_read_changes_nothing_and_an_empty_one_lets_nobody_in() {
        let file = file("first");
        let tokens = Tokens::open(file.path()).unwrap();
        let first = headers(&["Bearer first"]);
        tokens.update(Err("gone".into()));
        assert!(tokens.check(&first).is_ok());
        assert_eq!(tokens.status().last_error.as_deref(), Some("gone"));
        fs::write(file.path(), "").unwrap();
        tokens.update(read(file.path()));
        assert!(tokens.check(&first).is_err());
        assert_eq!(tokens.status().last_error, None);
    }
}
