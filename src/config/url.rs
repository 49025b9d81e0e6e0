//! URLs as settings, read by the `url` crate as the broker clients do.

use std::{fmt, ops::Deref};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use url::Url;

use super::value::non_empty;

/// A URL, or some separated by commas. Only code that dereferences it sees its passwords: a log or
/// an effective configuration shows `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The text with `***` for each password. A login without a password may be a token, so it is
    /// hidden whole.
    fn masked(&self) -> String {
        let is_list = self.0.split(',').all(|part| part.contains("://"));
        if is_list {
            let urls: Vec<_> = self.0.split(',').map(masked).collect();
            urls.join(",")
        } else {
            // The comma is one of the only URL's own.
            masked(&self.0)
        }
    }
}

impl Deref for SecretUrl {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<T: Into<String>> From<T> for SecretUrl {
    fn from(url: T) -> Self {
        Self(url.into())
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.masked(), f)
    }
}

impl Serialize for SecretUrl {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SecretUrl {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        non_empty(input, "a URL").map(Self)
    }
}

/// The URL with `***` for its password, or for its login if that has no password.
pub fn masked(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        return "***".into();
    };
    if !has_login(&url) {
        return text.into();
    }
    // Both fail only for a URL without a host, which has no login.
    let hidden = match url.password() {
        Some(_) => url.set_password(Some("***")),
        None => url.set_username("***"),
    };
    let space = &text[..text.len() - text.trim_start().len()];
    hidden.map_or_else(|()| "***".into(), |()| format!("{space}{url}"))
}

/// A message that shows a value, without the logins that are in it: a URL may be at the wrong key, or be
/// none.
pub fn without_logins(message: &str) -> String {
    // The rest is ours.
    let allowed = message.rfind("; allowed").unwrap_or(message.len());
    let (shown, rest) = message.split_at(allowed);
    let end = shown.rfind('@');
    let scheme = shown[..end.unwrap_or_default()].find("://");
    let scheme = scheme.map(|scheme| scheme + "://".len());
    let quote = shown.find('"').map(|quote| quote + 1);
    let is_masked = |(at, _)| shown[..at].ends_with("***");
    let all_are_masked = shown.match_indices('@').all(is_masked);
    // Without a scheme, a login is a user with a password.
    let is_login = |login: &str| scheme.is_some() || login.contains(':');
    match scheme.or(quote).zip(end) {
        Some((start, end)) if start < end && is_login(&shown[start..end]) && !all_are_masked => {
            format!("{}***{}{rest}", &shown[..start], &shown[end..])
        }
        _ => message.into(),
    }
}

/// The URL in `text` if it has one of the `schemes`, a host, and no port 0.
pub fn of_server(text: &str, schemes: &[&str]) -> Option<Url> {
    // The crate would drop white space and the slashes of a missing host.
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) || text.contains(":///") {
        return None;
    }
    let url = Url::parse(text).ok()?;
    let has_host = url.host_str().is_some_and(|host| !host.is_empty());
    let names_a_server = schemes.contains(&url.scheme()) && has_host && url.port() != Some(0);
    names_a_server.then_some(url)
}

/// Whether `text` is `host` or `host:port`.
pub fn is_host_and_port(text: &str) -> bool {
    !text.contains(['/', '?', '#', '@'])
        && of_server(&format!("http://{text}"), &["http"]).is_some()
}

/// Whether the URL carries a user, a password or a token.
pub fn has_login(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_and_no_token_is_shown() {
        for (url, shown) in [
            ("http://127.0.0.1:5000/", "http://127.0.0.1:5000/"),
            (
                "amqp://guest:guest@127.0.0.1:5672/%2f",
                "amqp://guest:***@127.0.0.1:5672/%2f",
            ),
            ("amqps://user:p@ss:word@rabbit", "amqps://user:***@rabbit"),
            (
                "amqps://user:p,ss@rabbit/%2f",
                "amqps://user:***@rabbit/%2f",
            ),
            (
                "amqp://user:\"quoted\\@rabbit?heartbeat=5",
                "amqp://user:***@rabbit?heartbeat=5",
            ),
            ("nats://token@nats:4222", "nats://***@nats:4222"),
            ("http://:secret@[::1]:81/a@b", "http://:***@[::1]:81/a@b"),
            ("http://host/path@home", "http://host/path@home"),
            ("host:8085", "host:8085"),
            ("amqp://user:secret@rabbit:port", "***"),
            (
                "nats://a:one@n1:4222, nats://two@n2,nats://n3",
                "nats://a:***@n1:4222, nats://***@n2,nats://n3",
            ),
        ] {
            let url = SecretUrl::from(url);
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), format!("{shown:?}"));
        }
    }

    #[test]
    fn a_message_shows_no_login() {
        for (message, shown) in [
            (
                "\"nats://me:pw@a\" does not fit",
                "\"nats://***@a\" does not fit",
            ),
            (
                "\"nats://a:p@b,nats://c:p@d\"; allowed is a",
                "\"nats://***@d\"; allowed is a",
            ),
            (
                "\"amqp://a:\\\"p /q@b\"; allowed is c@d",
                "\"amqp://***@b\"; allowed is c@d",
            ),
            (
                "\"amqp://a:***@b\" has no port",
                "\"amqp://a:***@b\" has no port",
            ),
            (
                "\"http://a b/\"; allowed is a",
                "\"http://a b/\"; allowed is a",
            ),
            ("\"me:pw@home\"; allowed is a", "\"***@home\"; allowed is a"),
            (
                "\"me:pw@a,nats://b\"; allowed is a",
                "\"***@a,nats://b\"; allowed is a",
            ),
            (
                "\"nats://me:a***b@h\" has no port",
                "\"nats://***@h\" has no port",
            ),
            ("matches \"a@b(\" is none", "matches \"a@b(\" is none"),
            ("me@home", "me@home"),
        ] {
            assert_eq!(without_logins(message), shown);
        }
    }

    #[test]
    fn a_url_names_a_server_by_scheme_host_and_port() {
        let fits = |url| of_server(url, &["http", "https"]).is_some();
        for url in [
            "http://a",
            "https://a.b-c_d:1",
            "http://u:p@a:65535/x?y#z",
            "http://[::1]:80/",
            "http://bücher.test",
        ] {
            assert!(fits(url), "{url}");
        }
        for url in [
            "",
            "a",
            "a:80",
            "ftp://a",
            "http://",
            "http:///x",
            "http://:80",
            "http://a:0",
            "http://a:65536",
            "http://a:b",
            "http://a b",
            "http://a\n",
            "http://[::1",
            "http://[a]:1",
            "http://[::1]80",
            "http://u:p/w@a",
        ] {
            assert!(!fits(url), "{url}");
        }
    }
}
