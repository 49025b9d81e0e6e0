//! Heads: the request line and the fields.

use super::{Case, Rest, TAKEN, class, closed, either, framed, open, post, request, then};
use crate::ingest::RECORD;

pub fn cases() -> Vec<Case> {
    [
        targets(),
        methods(),
        versions(),
        hosts(),
        names(),
        values(),
        sizes(),
        connections(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn targets() -> Vec<Case> {
    let with = |target: &str| request(format!("POST {target} HTTP/1.1"), "", RECORD);
    let long = format!("/{}", "a".repeat(70_000));
    let foreign = [
        "http://other/",
        "http://other/grpc",
        "http://a:81/",
        "http://a.other/",
        "http://b@a/",
        "http://a@other/",
        "https://other/",
        "ftp://a/",
        "ws://a/",
        "file://a/",
        "other:80",
        "a:80",
        "a",
    ];
    let malformed = [
        "/#",
        "/#grpc",
        "/grpc?x#y",
        "http://a/#b",
        "",
        "?",
        "/a b",
        "/\x00",
        "/é",
        "http:///",
        "http://",
        "\\",
        "/a\tb",
        "http://a b/",
        "http://[::1/",
        "http://a:b/",
        "http://a:99999/",
        &long,
    ];
    let unknown = [
        "*",
        "//other/",
        "/..",
        "/../grpc",
        "/%2e%2e",
        "/%00",
        "/%zz",
        "/%",
        "/\\",
        "/%2F",
        "//",
        "/./",
        "/grpc/",
        "/GRPC",
        "/nats",
        "/rabbitmq",
        "/pigeon",
        "/a/b",
        "/grpc;x",
        "/grpc%00",
        "/ingest",
        "/api/status",
        "/metrics",
        "/healthz",
        "http://a/pigeon",
    ];
    let good = [
        "/",
        "/grpc",
        "/?q=1",
        "/?a=%zz",
        "/grpc?x",
        "/%67rpc",
        "http://a/",
        "HTTP://A/",
        "http://a:80/grpc",
        "/?http://other/",
    ];
    [
        class(
            "a target of another host, or none",
            closed(400),
            foreign.map(with),
        ),
        class(
            "a target that is malformed",
            closed(400),
            malformed.map(with),
        ),
        class("a target that is not there", either(404), unknown.map(with)),
        class("a target that is there", TAKEN, good.map(with)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn methods() -> Vec<Case> {
    let with = |method: &str| request(format!("{method} / HTTP/1.1"), "", RECORD);
    let without = |line: &str| framed(format!("{line} HTTP/1.1"), "X: y", "");
    let long = "A".repeat(1000);
    let others = [
        "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PRI", "FOO", "post", "Post",
        "QUERY", &long,
    ];
    let bodiless = [
        "PUT /",
        "DELETE /",
        "OPTIONS /",
        "TRACE /",
        "PATCH /",
        "GET /grpc",
        "PUT /grpc",
        "POST /schema",
        "DELETE /schema",
    ];
    let malformed = [
        "P\x00ST", "PO ST", "(POST)", "", "POST\t", "P@ST", "\"POST\"", "POST:", "{POST}", "PÖST",
    ];
    [
        class("another method with a body", either(405), others.map(with)),
        class("another method", open(405), bodiless.map(without)),
        class(
            "a method that is no token",
            closed(400),
            malformed.map(with),
        ),
        class(
            "a path that is not there",
            open(404),
            ["GET /pigeon", "DELETE /pigeon", "GET /a/b"].map(without),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn versions() -> Vec<Case> {
    let with = |line: &str| request(line, "", RECORD);
    let bad = [
        "POST / HTTP/0.9",
        "POST / HTTP/1.2",
        "POST / HTTP/2.0",
        "POST / HTTP/2",
        "POST / HTTP/3",
        "POST / HTTP/1.1 ",
        "POST / http/1.1",
        "POST / HTTP/1",
        "POST / HTTP/11",
        "POST / HTTP/1.10",
        "POST / ",
        "POST /",
        "POST",
        "POST / XTTP/1.1",
        "POST / HTTP/-1.1",
        "POST / HTTP /1.1",
        "POST / HTTP/1.1\t",
        "POST  / HTTP/1.1",
        "POST /  HTTP/1.1",
        "POST\t/\tHTTP/1.1",
        "POST / HTTP/1.1 HTTP/1.1",
        "POST / HTTPS/1.1",
        "PRI * HTTP/2.0",
    ];
    [
        class(
            "a first line that is none of HTTP/1",
            closed(400),
            bad.map(with),
        ),
        class(
            "another protocol",
            closed(400),
            [
                &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
                b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
                b"SSH-2.0-OpenSSH_9.9\r\n",
                b"EHLO a\r\n",
                b"\x00\x00\x00\x00\r\n",
                b"AMQP\x00\x00\x09\x01\r\n",
            ],
        ),
        class("HTTP/1.0", closed(202), [with("POST / HTTP/1.0")]),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn hosts() -> Vec<Case> {
    let with = |host: &[u8]| {
        let length = format!("Content-Length: {}", RECORD.len());
        let parts = [
            b"POST / HTTP/1.1\r\nHost: ",
            host,
            b"\r\n",
            length.as_bytes(),
        ];
        [&parts.concat()[..], b"\r\n\r\n", RECORD.as_bytes()].concat()
    };
    let bad: [&[u8]; 17] = [
        b"a b",
        b"a/b",
        b"a@b",
        b"a:b",
        b"a:99999",
        b"a:1:2",
        b"a:-1",
        b":80",
        b"[::1",
        b"::1]",
        b"\xff",
        b"\xc3\xa9",
        b"http://a",
        b"a#b",
        b"a?b",
        b"<a>",
        b"a\x00",
    ];
    let good: [&[u8]; 9] = [
        b"",
        b"a:80",
        b"a:",
        b"127.0.0.1:8000",
        b"[::1]:80",
        b"_x",
        b"-",
        b"a..b",
        b"A",
    ];
    let length = RECORD.len();
    [
        class("a malformed host", closed(400), bad.map(with)),
        class(
            "no host, or two",
            closed(400),
            [
                format!("POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{RECORD}").into_bytes(),
                post("Host: b"),
                post("Host: a"),
                post("host:"),
            ],
        ),
        class("a host as it may be", TAKEN, good.map(with)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn names() -> Vec<Case> {
    let with = |name: &[u8]| post([name, b": v"].concat());
    let long = "X".repeat(300);
    let longer = "X".repeat(70_000);
    let bad: [&[u8]; 27] = [
        b"",
        b" X",
        b"X ",
        b"X\t",
        b"X Y",
        b"X(Y",
        b"X)",
        b"X\x00",
        b"X\x7f",
        b"X\xe9",
        b"\xc3\xa9",
        b"X/Y",
        b"X\"",
        b"X=",
        b"X[",
        b"X]",
        b"X{",
        b"X}",
        b"X@",
        b"X<",
        b"X>",
        b"X?",
        b"X\\",
        b"X,",
        b"X;",
        long.as_bytes(),
        longer.as_bytes(),
    ];
    let most = "X".repeat(250);
    let good: [&[u8]; 4] = [b"X:Y", b"_", b"!#$%&'*+-.^_`|~9", most.as_bytes()];
    [
        class("a name that is no token", closed(400), bad.map(with)),
        class(
            "a field without a colon",
            closed(400),
            ["nonsense", "nonsense here", "\"a\""].map(post),
        ),
        class("an odd name", TAKEN, good.map(with)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn values() -> Vec<Case> {
    let with = |value: &[u8]| post([b"X: ", value].concat());
    let bad: [&[u8]; 10] = [
        b"\x00", b"a\x00b", b"\x01", b"\x07", b"\x08", b"\x0b", b"\x0c", b"\x1b", b"\x1f", b"\x7f",
    ];
    let good: [&[u8]; 6] = [b"", b"\t", b"a\tb", b"\xff", b"\xc3\xa9", b"\"a"];
    [
        class("a control character in a value", closed(400), bad.map(with)),
        class("an odd value", TAKEN, good.map(with)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn sizes() -> Vec<Case> {
    let many = |count| {
        let fields: Vec<_> = (0..count).map(|number| format!("x-{number}: 1")).collect();
        post(fields.join("\r\n"))
    };
    let large = format!("X: {}", "a".repeat(127 << 10));
    [
        class("many headers", closed(431), [95, 96, 200].map(many)),
        // The host and the length are headers, too.
        class("as many headers as there may be", TAKEN, [many(94)]),
        class("a large head", TAKEN, [post(large)]),
        then(
            Rest::End,
            class(
                "a head that is too large",
                closed(431),
                [[
                    &b"GET / HTTP/1.1\r\nHost: a\r\nX: "[..],
                    &vec![b'x'; 128 << 10],
                ]
                .concat()],
            ),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn connections() -> Vec<Case> {
    let websocket = "Upgrade: websocket\r\nConnection: Upgrade";
    let h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA";
    let expectations = ["200-ok", "", "x"];
    [
        class(
            "an upgrade to WebSocket",
            closed(400),
            [
                post(websocket),
                post("Upgrade: WebSocket"),
                framed("GET / HTTP/1.1", websocket, ""),
            ],
        ),
        class(
            "another upgrade, which is not taken",
            closed(202),
            [post(h2c)],
        ),
        class(
            "a connection that ends",
            closed(202),
            ["close", "Close", "close, keep-alive", "keep-alive, close"]
                .map(|value| post(format!("Connection: {value}"))),
        ),
        class(
            "a connection that goes on",
            TAKEN,
            ["keep-alive", "TE", "", "nonsense", "X-Header"]
                .map(|value| post(format!("Connection: {value}"))),
        ),
        class(
            "an expectation that means nothing",
            TAKEN,
            expectations.map(|value| post(format!("Expect: {value}"))),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}
