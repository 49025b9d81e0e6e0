//! Keeps web pages of other sites away from the admin API.
//!
//! A browser sends the requests of any page to any address, this machine's included, so an address
//! that only this machine reaches is no protection. A request is refused if
//!
//! - its `Host` may be a name of somebody else's. A page can have its own name resolve to this
//!   address, and is of the same origin then (DNS rebinding). An address cannot be rebound, and
//!   neither can `localhost`;
//! - `Sec-Fetch-Site` (W3C Fetch Metadata) says that a page of another origin sends it;
//! - `Origin` (RFC 6454) is another origin, for browsers without Fetch Metadata.
//!
//! A program that is no browser sends neither of the last two. No answer has a header of CORS, so
//! no page of another origin reads one.

use std::net::{Ipv4Addr, Ipv6Addr};

use actix_web::http::{
    StatusCode, Uri,
    header::{self, HeaderMap, HeaderValue},
    uri::Authority,
};

use super::problem::{Problem, ProblemKind};

const SEC_FETCH_DEST: &str = "sec-fetch-dest";
const SEC_FETCH_MODE: &str = "sec-fetch-mode";
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Refuses a request of a foreign page. `names` are the host names of `[admin].hosts`.
pub fn refuse(uri: &Uri, headers: &HeaderMap, names: &[String]) -> Result<(), Problem> {
    let host = own_host(uri, headers, names)?;
    for site in headers.get_all(SEC_FETCH_SITE) {
        if site != "same-origin" && site != "none" {
            return Err(foreign(site));
        }
    }
    for origin in headers.get_all(header::ORIGIN) {
        let other = parse_origin(origin).ok_or_else(|| foreign(origin))?;
        let is_same = other.as_str().eq_ignore_ascii_case(host.as_str());
        // A proxy may put another host in the place of the one that the browser knows.
        if !is_same && !is_named(other.host(), names) {
            return Err(foreign(origin));
        }
    }
    Ok(())
}

/// The same, but a link of a foreign page may lead here: the browser shows the answer in a tab of
/// its own, and lets that page read nothing of it.
pub fn refuse_unless_link(uri: &Uri, headers: &HeaderMap, names: &[String]) -> Result<(), Problem> {
    let is = |name, value| headers.get(name).is_some_and(|found| found == value);
    if is(SEC_FETCH_MODE, "navigate") && is(SEC_FETCH_DEST, "document") {
        own_host(uri, headers, names).map(drop)
    } else {
        refuse(uri, headers, names)
    }
}

/// The host that the request is for, which is this node.
fn own_host(uri: &Uri, headers: &HeaderMap, names: &[String]) -> Result<Authority, Problem> {
    let host = host(uri, headers)?;
    if !is_address(host.host()) && !is_named(host.host(), names) {
        let detail = format!(
            "The host {host} is not this node's. Use its IP address or localhost, or add the name to \
             [admin].hosts"
        );
        let status = StatusCode::MISDIRECTED_REQUEST;
        return Err(Problem::new(status, ProblemKind::Host, detail));
    }
    Ok(host)
}

/// The one host that the request is for, with its port.
fn host(uri: &Uri, headers: &HeaderMap) -> Result<Authority, Problem> {
    let wrong = |detail: &str| Problem::bad_request(ProblemKind::Host, detail);
    let mut hosts = headers.get_all(header::HOST);
    let host = hosts.next();
    let host = host.ok_or_else(|| wrong("The request has no Host"))?;
    let host = parse_authority(host.as_bytes());
    let host = host.ok_or_else(|| wrong("The Host is malformed"))?;
    // The URI of a request to a proxy has a host of its own (RFC 9112, 3.2.2).
    let is_other = |other: &Authority| *other != host;
    if hosts.next().is_some() || uri.authority().is_some_and(is_other) {
        return Err(wrong("The request has more than one host"));
    }
    Ok(host)
}

/// `None` for an origin without a host, such as `null`.
fn parse_origin(origin: &HeaderValue) -> Option<Authority> {
    let origin = origin.as_bytes();
    let http = origin.strip_prefix(b"http://");
    parse_authority(http.or_else(|| origin.strip_prefix(b"https://"))?)
}

/// A host with or without a port, and without a login.
fn parse_authority(text: &[u8]) -> Option<Authority> {
    let authority = Authority::try_from(text).ok()?;
    (!authority.as_str().contains('@')).then_some(authority)
}

/// An IP address, or `localhost`.
fn is_address(host: &str) -> bool {
    let v6 = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    v6.map_or_else(
        || host.parse::<Ipv4Addr>().is_ok(),
        |host| host.parse::<Ipv6Addr>().is_ok(),
    ) || host.eq_ignore_ascii_case("localhost")
}

/// A name that begins with a dot stands for all names that end with it.
fn is_named(host: &str, names: &[String]) -> bool {
    let host = host.to_ascii_lowercase();
    names.iter().any(|name| {
        let name = name.to_ascii_lowercase();
        host == name || name.starts_with('.') && host.ends_with(&name)
    })
}

fn foreign(origin: &HeaderValue) -> Problem {
    let detail = format!(
        "A page of another origin ({}) may not use the admin API",
        String::from_utf8_lossy(origin.as_bytes())
    );
    Problem::new(StatusCode::FORBIDDEN, ProblemKind::Origin, detail)
}

#[cfg(test)]
mod tests {
    use actix_web::{ResponseError as _, http::header::HeaderName};

    use super::*;

    /// The status for a request with these headers, one a line.
    fn status(uri: &str, lines: &str) -> u16 {
        let mut headers = HeaderMap::new();
        for line in lines.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            let name = HeaderName::try_from(name).unwrap();
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        let names = ["waypost.example.com".into(), ".nodes.internal".into()];
        let refused = refuse(&uri.parse().unwrap(), &headers, &names);
        refused.map_or_else(|problem| problem.status_code().as_u16(), |()| 200)
    }

    #[test]
    fn a_host_is_an_address_localhost_or_a_name_of_the_configuration() {
        for (host, expected) in [
            ("127.0.0.1:8001", 200),
            ("127.0.0.1", 200),
            ("10.1.2.3:9999", 200),
            ("[::1]:8001", 200),
            ("localhost:8001", 200),
            ("LOCALHOST", 200),
            ("waypost.example.com", 200),
            ("Waypost.Example.com:443", 200),
            ("node-a.nodes.internal:8001", 200),
            ("a.b.nodes.internal", 200),
            ("evil.example.com:8001", 421),
            ("waypost.example.com.evil.com", 421),
            ("evil-waypost.example.com", 421),
            ("x.waypost.example.com", 421),
            ("nodes.internal", 421),
            ("evilnodes.internal", 421),
            ("localhost.evil.com", 421),
            ("127.0.0.1.evil.com", 421),
            // Not the notation of an address that browsers send.
            ("127.1", 421),
            ("2130706433", 421),
            ("::1", 400),
            ("localhost@evil.com", 400),
            ("a b", 400),
        ] {
            let line = format!("host: {host}");
            assert_eq!(status("/api/status", &line), expected, "{host}");
            let absolute = format!("http://{host}/api/status");
            if absolute
                .parse::<Uri>()
                .is_ok_and(|uri| uri.authority().is_some())
            {
                assert_eq!(status(&absolute, &line), expected, "{absolute}");
            }
        }
        let twice = "host: 127.0.0.1\nhost: evil.example.com";
        assert_eq!(status("/", twice), 400);
        assert_eq!(status("/", ""), 400, "no host");
        let forwarded = "host: evil.example.com\nx-forwarded-host: 127.0.0.1\nforwarded: host=::1";
        assert_eq!(status("/", forwarded), 421);
        assert_eq!(status("http://evil.example.com/", "host: 127.0.0.1"), 400);
    }

    #[test]
    fn a_page_is_of_the_same_origin_or_of_a_host_of_the_configuration() {
        for (lines, expected) in [
            ("origin: http://127.0.0.1:8001", 200),
            ("origin: https://127.0.0.1:8001", 200),
            ("origin: https://waypost.example.com", 200),
            ("origin: http://127.0.0.1", 403),
            ("origin: http://127.0.0.1:9999", 403),
            ("origin: http://localhost:8001", 403),
            ("origin: https://evil.example.com", 403),
            ("origin: null", 403),
            ("origin: file://", 403),
            ("origin: http://a@127.0.0.1:8001", 403),
            (
                "origin: http://127.0.0.1:8001\norigin: http://evil.com",
                403,
            ),
            ("sec-fetch-site: same-origin", 200),
            ("sec-fetch-site: none", 200),
            ("sec-fetch-site: same-site", 403),
            ("sec-fetch-site: cross-site", 403),
            ("sec-fetch-site: none\nsec-fetch-site: cross-site", 403),
            (
                "sec-fetch-site: cross-site\norigin: http://127.0.0.1:8001",
                403,
            ),
            ("sec-fetch-site: same-origin\norigin: http://evil.com", 403),
        ] {
            let lines = format!("host: 127.0.0.1:8001\n{lines}");
            assert_eq!(status("/api/status", &lines), expected, "{lines}");
        }
    }
}
