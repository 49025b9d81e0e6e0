//! Who may send a request: those who present one of the tokens of a file (RFC 6750).

use std::{path::Path, sync::Arc};

use actix_web::http::{
    StatusCode,
    header::{self, HeaderMap},
};

use super::problem::{Problem, ProblemKind};
use crate::secrets::{FileHealth, TokenSet, WatchedFile};

/// The tokens of a file. Clones share them.
#[derive(Clone)]
pub struct Tokens(Arc<WatchedFile<TokenSet>>);

impl Tokens {
    /// Reads the file that `key` of the configuration names, and reads it again on this thread's
    /// runtime.
    ///
    /// # Errors
    /// If it cannot be read, has no token, or has one that no client can send.
    pub fn open(key: &str, path: &Path) -> Result<Self, String> {
        TokenSet::read_some(path)?;
        let path = path.to_owned();
        // With the last token, the last client loses its access.
        let file = WatchedFile::open(key, move || TokenSet::read(&path))?;
        let file = Arc::new(file);
        actix_rt::spawn(Arc::clone(&file).keep_reading());
        Ok(Self(file))
    }

    pub fn health(&self) -> &Arc<FileHealth> {
        self.0.health()
    }

    /// # Errors
    /// The problem of a request that presents none of the tokens.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let mut lines = headers.get_all(header::AUTHORIZATION);
        let Some(line) = lines.next() else {
            return Err(unauthorized(
                "Bearer realm=\"waypost\"",
                "This needs a token: send Authorization: Bearer TOKEN",
            ));
        };
        let token = bearer(line.as_bytes()).filter(|_| lines.next().is_none());
        if token.is_some_and(|token| self.0.get().has(token)) {
            return Ok(());
        }
        Err(unauthorized(
            "Bearer realm=\"waypost\", error=\"invalid_token\"",
            "The Authorization has no token that this node knows",
        ))
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use actix_web::{ResponseError as _, http::header::HeaderValue};
    use tempfile::NamedTempFile;

    use super::*;

    fn headers(lines: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::AUTHORIZATION, HeaderValue::from_str(line).unwrap());
        }
        headers
    }

    #[actix_rt::test]
    async fn only_a_token_of_the_file_is_taken() {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(b"first\nsecond\nthird").unwrap();
        let tokens = Tokens::open("ingest.tokens_file", file.path()).unwrap();
        for line in ["Bearer first", "bearer second", "BEARER  third "] {
            assert!(tokens.check(&headers(&[line])).is_ok(), "{line}");
        }
        for lines in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &["Bearer fourth"],
            &["Bearer firs"],
            &["Bearer first second"],
            &["Basic first"],
            &["first"],
            &["Bearer first", "Bearer first"],
            &["Bearer fourth", "Bearer first"],
        ] {
            let problem = tokens.check(&headers(lines)).unwrap_err();
            assert_eq!(problem.status_code(), StatusCode::UNAUTHORIZED, "{lines:?}");
        }
    }
}
