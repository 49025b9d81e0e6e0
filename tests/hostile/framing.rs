//! Framing: where a line, a head and a body end.

use super::{Case, Rest, TAKEN, class, closed, either, framed, post, then};
use crate::ingest::RECORD;

pub fn cases() -> Vec<Case> {
    [
        lengths(),
        transfer_codings(),
        chunk_sizes(),
        chunks(),
        line_ends(),
        unfinished(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn lengths() -> Vec<Case> {
    let with = |value: &[u8]| {
        framed(
            "POST / HTTP/1.1",
            [b"Content-Length: ", value].concat(),
            RECORD,
        )
    };
    let length = RECORD.len();
    let doubled = format!("{length}, {length}");
    let bad: [&[u8]; 15] = [
        b"-1",
        b"+5",
        b"0x5c",
        b"1e2",
        doubled.as_bytes(),
        b"92,93",
        b"9 2",
        b"",
        b" ",
        b"99999999999999999999999",
        b"18446744073709551616",
        b"\xb92",
        b"92.0",
        b"\"92\"",
        b"92;a=b",
    ];
    let padded = format!("Content-Length:{}{length}", " ".repeat(60));
    [
        class("a length that is no number", closed(400), bad.map(with)),
        class(
            "lengths in conflict, or repeated",
            closed(400),
            [
                post(format!("Content-Length: {length}")),
                post("Content-Length: 10"),
                post("content-length: 0"),
                post("Transfer-Encoding: chunked"),
                framed(
                    "POST / HTTP/1.1",
                    format!("Content-Length : {length}"),
                    RECORD,
                ),
                framed("POST / HTTP/1.1", padded, RECORD),
            ],
        ),
        class(
            "a length above the limit",
            either(413),
            [
                with(b"1048577"),
                with(b"99999999999"),
                with(b"18446744073709551615"),
            ],
        ),
        class(
            "a length of the same value",
            TAKEN,
            [
                with(format!("0{length}").as_bytes()),
                with(format!("000000000000{length}").as_bytes()),
                with(format!("  {length}\t ").as_bytes()),
                framed(
                    "POST / HTTP/1.1",
                    format!("CONTENT-LENGTH:{length}"),
                    RECORD,
                ),
            ],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The record in one chunk.
fn one_chunk() -> String {
    format!("{:x}\r\n{RECORD}\r\n0\r\n\r\n", RECORD.len())
}

fn transfer_codings() -> Vec<Case> {
    let with = |value: &str| {
        let coding = format!("Transfer-Encoding: {value}");
        framed("POST / HTTP/1.1", coding, one_chunk())
    };
    let old = |fields: &str| framed("POST / HTTP/1.0", fields, one_chunk());
    let bad = [
        "gzip, chunked",
        "chunked, gzip",
        "chunked, chunked",
        "identity",
        "gzip",
        "deflate",
        "",
        "xchunked",
        "chunkedx",
        "chunked;q=1",
        "\"chunked\"",
        "\x0bchunked",
        "chunked, identity",
        "identity, chunked",
        ",chunked",
        "chunked,",
        "chun ked",
        "chunked\r\nTransfer-Encoding: chunked",
        "chunked\r\nTransfer-Encoding: identity",
        "identity\r\nTransfer-Encoding: chunked",
    ];
    [
        class(
            "a transfer coding that is not chunked",
            closed(400),
            bad.map(with),
        ),
        class(
            "a transfer coding in HTTP/1.0",
            closed(400),
            [
                old("Transfer-Encoding: chunked"),
                old("Transfer-Encoding: chunked\r\nContent-Length: 5"),
            ],
        ),
        class(
            "chunked in any case",
            TAKEN,
            ["chunked", "Chunked", "CHUNKED", "  chunked\t"].map(with),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn chunk_sizes() -> Vec<Case> {
    let with = |size: &str| {
        let body = format!("{size}\r\n{RECORD}\r\n0\r\n\r\n");
        framed("POST / HTTP/1.1", "Transfer-Encoding: chunked", body)
    };
    let size = format!("{:x}", RECORD.len());
    let bad_sizes = [
        "",
        "-5",
        "0x5c",
        "fffffffffffffffff",
        "g",
        "5g",
        "5_",
        "5 5",
        "5.0",
        "\u{665}",
        "5,5",
    ];
    [
        class(
            "the size of a chunk is no number",
            closed(400),
            bad_sizes.map(with),
        ),
        class(
            "the size of a chunk is not as in the grammar",
            closed(400),
            [
                with(&format!(" {size}")),
                with(&format!("+{size}")),
                with(&format!("{}{size}", "0".repeat(64))),
                with(&format!("\t{size}")),
            ],
        ),
        class(
            "the size of a chunk is another one",
            closed(400),
            [with("5"), with(&format!("{:x}", RECORD.len() + 1))],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn chunks() -> Vec<Case> {
    let with = |body: String| framed("POST / HTTP/1.1", "Transfer-Encoding: chunked", body);
    let size = format!("{:x}", RECORD.len());
    let (end, rest) = ("0\r\n\r\n", format!("\r\n{RECORD}\r\n0\r\n\r\n"));
    let sized = |size: &str| format!("{size}{rest}");
    let trailed = |trailer: &str| format!("{size}\r\n{RECORD}\r\n0\r\n{trailer}");
    let extended = |length| format!("{size};{}{rest}", "a".repeat(length));
    let each: String = RECORD
        .chars()
        .map(|letter| format!("{}\r\n{letter}\r\n", letter.len_utf8()))
        .collect::<Vec<_>>()
        .concat();
    [
        class(
            "a chunk has a long extension",
            closed(400),
            [300, 1024, 65_536, 200_000].map(|length| with(extended(length))),
        ),
        class(
            "a line of the chunks ends otherwise",
            closed(400),
            [
                with(format!("{size}\n{RECORD}\r\n{end}")),
                with(format!("{size}\r{RECORD}\r\n{end}")),
                with(format!("{size}\r\n{RECORD}\n{end}")),
                with(format!("{size}\r\n{RECORD}{end}")),
                with(format!("{size};a=b\n{RECORD}\r\n{end}")),
                with(format!("{size};a\r\n\r{RECORD}\r\n{end}")),
                with(trailed("\n")),
                with(trailed("X: y\n\r\n")),
                with(trailed("\r\r\n")),
            ],
        ),
        class(
            "a control character in an extension",
            closed(400),
            ["\x01", "\x00", "\x7f", "\x0b"].map(|bad| with(sized(&format!("{size};{bad}")))),
        ),
        class(
            "a trailer is malformed or long",
            closed(400),
            [
                with(trailed("nonsense\r\n\r\n")),
                with(trailed(&format!("X: {}\r\n\r\n", "y".repeat(10_000)))),
                with(trailed(&format!("{}\r\n", "X: y\r\n".repeat(2000)))),
            ],
        ),
        class(
            "more framing than data",
            closed(400),
            [with(format!(
                "{}{end}",
                format!("1;{}\r\n \r\n", "a".repeat(200)).repeat(200)
            ))],
        ),
        class(
            "chunks as they may be",
            TAKEN,
            [
                with(extended(10)),
                with(sized(&format!("{size};a=b;c=\"d e\""))),
                with(sized(&format!("{size} "))),
                with(sized(&format!("0000{size}"))),
                with(sized(&size.to_ascii_uppercase())),
                with(each + end),
                with(trailed("X: y\r\n\r\n")),
                with(trailed("Content-Length: 3\r\nHost: b\r\n\r\n")),
            ],
        ),
        then(
            Rest::End,
            class(
                "chunks without an end",
                closed(400),
                [
                    with(size.clone()),
                    with(format!("{size}\r\n{RECORD}")),
                    with(format!("{size}\r\n{RECORD}\r\n0\r\n")),
                    with(format!("7fffffffffffffff\r\n{RECORD}")),
                ],
            ),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn line_ends() -> Vec<Case> {
    let whole = post("X: y");
    let text = String::from_utf8(whole.clone()).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let with = |head: String, end: &str| format!("{head}{end}{body}");
    let bare = [
        with(head.replace("\r\n", "\n"), "\n\n"),
        with(head.replacen("\r\n", "\n", 1), "\r\n\r\n"),
        with(head.replacen("\r\nX", "\nX", 1), "\r\n\r\n"),
        with(head.to_owned(), "\n\n"),
        with(head.to_owned(), "\r\n\n"),
        with(head.to_owned(), "\n\r\n"),
        with(head.replace("X: y", "X: y\nContent-Length: 1"), "\r\n\r\n"),
        format!("\n{text}"),
        with(head.replace("X: y", "X: y\n z"), "\r\n\r\n"),
    ];
    let returns = [
        with(head.replace("\r\n", "\r"), "\r\r"),
        with(head.replace("X: y", "X: a\rb"), "\r\n\r\n"),
        with(head.replace("X: y", "X: y\rContent-Length: 1"), "\r\n\r\n"),
        with(head.replacen(" HTTP/1.1", " HTTP/1.1\r", 1), "\r\n\r\n"),
        with(head.to_owned(), "\r\r\n"),
        format!("\r{text}"),
    ];
    let folded = [
        "X: a\r\n b",
        "X: a\r\n\tb",
        "X: a\r\n \r\nY: b",
        "X:\r\n b",
        "X: a\r\n Content-Length: 1",
    ];
    [
        class("a line ends with LF alone", closed(400), bare),
        class("a CR that ends no line", closed(400), returns),
        class("a folded line", closed(400), folded.map(post)),
        class(
            "a folded first line",
            closed(400),
            [framed("GET / HTTP/1.1\r\n X: a", "Y: b", "")],
        ),
        class(
            "white space before a request",
            closed(400),
            [
                format!(" {text}"),
                format!("\t{text}"),
                format!("\x00{text}"),
                format!("\u{feff}{text}"),
            ],
        ),
        class(
            "empty lines before a request",
            TAKEN,
            [format!("\r\n{text}"), format!("\r\n\r\n\r\n{text}")],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn unfinished() -> Vec<Case> {
    let whole = post("X: y");
    let short = framed("POST / HTTP/1.1", "Content-Length: 1000", RECORD);
    [
        // Without the request behind them: it would be the rest.
        then(
            Rest::Nothing,
            class(
                "half a head",
                closed(408),
                [&whole[..20], b"G", b"GET / HTTP/1.1\r\n", b"\r\n"],
            ),
        ),
        then(
            Rest::Nothing,
            class("half a body", closed(408), [short.clone()]),
        ),
        then(
            Rest::End,
            class("half a body, and the end", closed(400), [short]),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}
