//! The host that a request is for: its `Host`, and the authority of its target (RFC 9112, 3.2).

use actix_http::RequestHead;
use actix_web::http::{
    Method,
    header::{self, HeaderValue},
    uri::Authority,
};

use super::problem::{Problem, ProblemKind};

/// Refuses a request whose host is malformed, or which names two. A proxy may have looked at the
/// other one.
pub fn check(request: &RequestHead) -> Result<(), Problem> {
    // The HTTP library lets a request of HTTP/1.0 alone have none, and no request two.
    let host = request.headers().get(header::HOST);
    let host = host.map(HeaderValue::as_bytes).unwrap_or_default();
    // A target that is no URL may have no host.
    let parsed = match host {
        b"" => None,
        // Nearly all are, and need no parser.
        host if request.uri.authority().is_none() && is_plain(host) => return Ok(()),
        host => Some(authority(host).ok_or_else(malformed)?),
    };
    let Some(target) = request.uri.authority() else {
        return Ok(());
    };
    let Some(scheme) = request.uri.scheme_str() else {
        // `host:port` is the target of a request for a tunnel.
        let is_tunnel = request.method == Method::CONNECT;
        return if is_tunnel { Ok(()) } else { Err(foreign()) };
    };
    let port = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return Err(foreign()),
    };
    let target = authority(target.as_str().as_bytes()).ok_or_else(foreign)?;
    let same = |host: &Authority| {
        let ports = [&target, host].map(|of| of.port_u16().unwrap_or(port));
        target.host().eq_ignore_ascii_case(host.host()) && ports[0] == ports[1]
    };
    if parsed.as_ref().is_some_and(same) {
        Ok(())
    } else {
        Err(foreign())
    }
}

/// Whether `host` is a name or an address of version 4, and perhaps a port: then it is well-formed.
fn is_plain(host: &[u8]) -> bool {
    let name = host.iter().take_while(|byte| is_of_name(**byte)).count();
    let port = host[name..].strip_prefix(b":").unwrap_or(&host[name..]);
    // From 60000 on, a number of five digits may be no port.
    let is_small = port.len() < 5 || port.len() == 5 && port[0] < b'6';
    name > 0 && is_small && port.iter().all(u8::is_ascii_digit)
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.')
}

/// The host and the port, without a login.
fn authority(text: &[u8]) -> Option<Authority> {
    let authority = Authority::try_from(text).ok()?;
    let host = authority.host();
    let port = authority.as_str().strip_prefix(host)?;
    let has_good_port = match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(port) => port.is_empty() || authority.port_u16().is_some(),
    };
    (has_good_port && !host.is_empty()).then_some(authority)
}

fn malformed() -> Problem {
    Problem::bad_request(
        ProblemKind::Request,
        "The Host is no host with a port or without one",
    )
}

fn foreign() -> Problem {
    Problem::bad_request(
        ProblemKind::Request,
        "The target of the request is neither a path nor a URL of the Host",
    )
}

#[cfg(test)]
mod tests {
    use actix_http::Request;

    use super::*;

    fn is_good(method: &str, target: &str, host: Option<&[u8]>) -> bool {
        let mut request = Request::new();
        let head = request.head_mut();
        head.method = method.parse().unwrap();
        head.uri = target.parse().unwrap();
        if let Some(host) = host {
            let host = HeaderValue::from_bytes(host).unwrap();
            head.headers_mut().insert(header::HOST, host);
        }
        check(head).is_ok()
    }

    #[test]
    fn a_host_is_a_host_with_a_port_or_without_one() {
        for (host, expected) in [
            (&b"a"[..], true),
            (b"", true),
            (b"a.example.com:8000", true),
            (b"a:", true),
            (b"127.0.0.1:1", true),
            (b"127.0.0.1:59999", true),
            (b"127.0.0.1:65535", true),
            (b"127.0.0.1:65536", false),
            (b"127.0.0.1:123456", false),
            (b"127.0.0.1:5a999", false),
            (b"[::1]:80", true),
            (b"[::1]", true),
            (b"_x", true),
            (b"a%2fb", false),
            (b"a b", false),
            (b"a/b", false),
            (b"a@b", false),
            (b"a:b", false),
            (b"a:99999", false),
            (b"a:1:2", false),
            (b"[::1", false),
            (b":80", false),
            (b"http://a", false),
            (b"\xff", false),
            (b"a#b", false),
            (b"a?b", false),
            (b"<a>", false),
        ] {
            let shown = String::from_utf8_lossy(host);
            assert_eq!(is_good("POST", "/", Some(host)), expected, "{shown}");
        }
        assert!(is_good("POST", "/", None), "HTTP/1.0");
    }

    #[test]
    fn a_url_as_the_target_is_of_the_same_host() {
        for (target, host, expected) in [
            ("http://a/", "a", true),
            ("HTTP://A/grpc?x", "a", true),
            ("http://a/", "a:80", true),
            ("http://a:80/", "a", true),
            ("https://a/", "a:443", true),
            ("http://[::1]:8/", "[::1]:8", true),
            ("http://other/", "a", false),
            ("http://a:81/", "a", false),
            ("https://a/", "a:80", false),
            ("http://b@a/", "a", false),
            ("ftp://a/", "a", false),
            ("a:80", "a:80", false),
            ("a", "a", false),
            ("*", "a", true),
        ] {
            assert_eq!(
                is_good("POST", target, Some(host.as_bytes())),
                expected,
                "{target}"
            );
        }
        assert!(!is_good("POST", "http://a/", None));
        assert!(is_good("CONNECT", "other:80", Some(b"a")));
    }
}
