//! Who may send a request: those who present one of the tokens of a file (RFC 6750).

use std::{borrow::Cow, path::Path, sync::Arc, time::Duration};

use actix_web::http::{
    StatusCode,
    header::{self, HeaderMap},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use memchr::memchr;

use super::problem::{Problem, ProblemKind};
use crate::secrets::{FileHealth, TokenSet, WatchedFile};

/// How long the check of a token counts while a body comes.
pub const TOKEN_TRUST: Duration = Duration::from_secs(1);

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
        let named = path.to_owned();
        let file = WatchedFile::open(key, [path], move |_| TokenSet::read(&named))?;
        let file = Arc::new(file.counted(|tokens| Some(tokens.count())));
        actix_rt::spawn(Arc::clone(&file).keep_reading());
        Ok(Self(file))
    }

    pub fn health(&self) -> &Arc<FileHealth> {
        self.0.health()
    }

    /// The token of a request that presents one.
    ///
    /// # Errors
    /// The problem of a request that presents none of the tokens.
    pub fn check<'h>(&self, headers: &'h HeaderMap) -> Result<&'h [u8], Problem> {
        self.check_with(headers, "", bearer)
    }

    /// The same for a person at a browser, too, who gives a token as the password of any user
    /// (RFC 7617): a page cannot send a bearer token before it is there.
    ///
    /// # Errors
    /// The problem of a request that presents none of the tokens.
    pub fn check_operator(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let checked = self.check_with(headers, ", Basic realm=\"waypost\"", |line| {
            let bearer = bearer(line).map(Cow::Borrowed);
            bearer.or_else(|| Some(Cow::Owned(password(line)?)))
        });
        checked.map(drop)
    }

    /// Ends when [`Tokens::check_operator`] refuses these headers.
    pub async fn until_refused(self, headers: HeaderMap) {
        let mut changes = self.0.changes();
        // This has their sender, so they do not end before.
        while self.check_operator(&headers).is_ok() && changes.changed().await.is_ok() {}
    }

    fn check_with<'h, T: AsRef<[u8]>>(
        &self,
        headers: &'h HeaderMap,
        other_challenges: &str,
        token: impl Fn(&'h [u8]) -> Option<T>,
    ) -> Result<T, Problem> {
        let mut lines = headers.get_all(header::AUTHORIZATION);
        let (challenge, detail) = match lines.next() {
            None => (
                "Bearer realm=\"waypost\"",
                "This needs a token: send Authorization: Bearer TOKEN",
            ),
            Some(line) => {
                let token = token(line.as_bytes()).filter(|_| lines.next().is_none());
                if let Some(token) = token.filter(|token| self.0.get().has(token.as_ref())) {
                    return Ok(token);
                }
                (
                    "Bearer realm=\"waypost\", error=\"invalid_token\"",
                    "The Authorization has no token that this node knows",
                )
            }
        };
        let problem = Problem::new(StatusCode::UNAUTHORIZED, ProblemKind::Token, detail);
        let challenges = format!("{challenge}{other_challenges}");
        Err(problem.with_header(header::WWW_AUTHENTICATE, challenges))
    }
}

/// The token of the scheme `Bearer`.
fn bearer(line: &[u8]) -> Option<&[u8]> {
    credentials(line, b"Bearer ")
}

/// The password of the scheme `Basic`.
fn password(line: &[u8]) -> Option<Vec<u8>> {
    let login = BASE64_STANDARD.decode(credentials(line, b"Basic ")?).ok()?;
    let colon = memchr(b':', &login)?;
    Some(login[colon + 1..].to_vec())
}

/// What follows the name of a scheme, which is not case-sensitive (RFC 9110, 11.1).
fn credentials<'h>(line: &'h [u8], scheme: &[u8]) -> Option<&'h [u8]> {
    let (name, credentials) = line.split_at_checked(scheme.len())?;
    let is_of_it = name.eq_ignore_ascii_case(scheme);
    is_of_it.then(|| credentials.trim_ascii())
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
            let headers = headers(lines);
            let checks = [
                tokens.check(&headers).map(drop),
                tokens.check_operator(&headers),
            ];
            for checked in checks {
                let problem = checked.unwrap_err();
                assert_eq!(problem.status_code(), StatusCode::UNAUTHORIZED, "{lines:?}");
            }
        }
        // A browser sends `USER:PASSWORD` in base64.
        for (login, is_known) in [
            ("me:first", true),
            (":second", true),
            ("me:not first", false),
            ("first", false),
            ("first:", false),
            ("me:first:", false),
        ] {
            let login = format!("Basic {}", BASE64_STANDARD.encode(login));
            let headers = headers(&[&login]);
            assert_eq!(tokens.check_operator(&headers).is_ok(), is_known, "{login}");
            assert!(tokens.check(&headers).is_err(), "{login}");
        }
        assert!(tokens.check_operator(&headers(&["Basic %"])).is_err());
    }
}
