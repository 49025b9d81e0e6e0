//! URLs as settings: whether one names a server, and how it is shown without its secrets.

use std::net::Ipv6Addr;

/// `scheme://login@server/rest`, cut as the clients cut it. The slices are those of the text.
struct Url<'u> {
    scheme: &'u str,
    login: Option<&'u str>,
    /// Host and port.
    server: &'u str,
    rest: &'u str,
}

impl<'u> Url<'u> {
    fn split(text: &'u str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (login, server) = authority
            .rsplit_once('@')
            .map_or((None, authority), |(login, rest)| (Some(login), rest));
        Some(Self {
            scheme,
            login,
            server,
            rest,
        })
    }
}

/// Whether `text` is a URL of one of the `schemes` and names a host, and a port that can be connected to if any.
#[must_use]
pub fn names_a_server(text: &str, schemes: &[&str]) -> bool {
    !text.contains(|c: char| c.is_whitespace() || c.is_control())
        && Url::split(text)
            .is_some_and(|url| schemes.contains(&url.scheme) && is_server(url.server))
}

/// Whether `text` is `host` or `host:port`.
#[must_use]
pub fn is_server(text: &str) -> bool {
    let (host_fits, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        (address.parse::<Ipv6Addr>().is_ok(), port)
    } else {
        let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
        (
            !host.is_empty()
                && host
                    .chars()
                    .all(|c| c.is_alphanumeric() || "-._".contains(c)),
            port,
        )
    };
    let is_port = |digits: &str| {
        digits.bytes().all(|digit| digit.is_ascii_digit())
            && digits.parse::<u16>().is_ok_and(|port| port > 0)
    };
    host_fits && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

/// The user that a URL names, its password beside it or elsewhere.
#[must_use]
pub fn user(text: &str) -> Option<&str> {
    let login = Url::split(text)?.login?;
    Some(login.split_once(':').map_or(login, |(user, _)| user)).filter(|user| !user.is_empty())
}

/// Whether a URL carries a user, a password or a token.
#[must_use]
pub fn has_login(text: &str) -> bool {
    Url::split(text).is_some_and(|url| url.login.is_some())
}

/// The URL with `***` for its password. A login without a password may be a token, and is hidden whole.
#[must_use]
pub fn masked(text: &str) -> String {
    let Some(Url {
        scheme,
        login: Some(login),
        server,
        rest,
    }) = Url::split(text)
    else {
        return text.to_owned();
    };
    let user = login
        .split_once(':')
        .map(|(user, _)| format!("{user}:"))
        .unwrap_or_default();
    format!("{scheme}://{user}***@{server}{rest}")
}

/// As [`masked`], for URLs that are separated by commas.
#[must_use]
pub fn masked_list(text: &str) -> String {
    text.split(',').map(masked).collect::<Vec<_>>().join(",")
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
                "amqp://user:\"quoted\\@rabbit?heartbeat=5",
                "amqp://user:***@rabbit?heartbeat=5",
            ),
            ("nats://token@nats:4222", "nats://***@nats:4222"),
            ("http://:secret@[::1]:80/a@b", "http://:***@[::1]:80/a@b"),
            ("http://host/path@home", "http://host/path@home"),
            ("host:8085", "host:8085"),
        ] {
            assert_eq!(masked(url), shown);
        }
        assert_eq!(
            masked_list("nats://a:one@n1:4222, nats://two@n2,nats://n3"),
            "nats://a:***@n1:4222, nats://***@n2,nats://n3"
        );
    }

    #[test]
    fn a_url_names_a_server_by_scheme_host_and_port() {
        let fits = |url| names_a_server(url, &["http", "https"]);
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
            "http://a:",
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
