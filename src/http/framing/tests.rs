use proptest::{collection::vec, prelude::*};

use super::*;

/// The fault of `bytes` that come in pieces of this size, and the number of good ones.
fn fault(bytes: &[u8], piece: usize) -> Option<(usize, FramingFault)> {
    let mut framing = Framing::default();
    let mut pieces = bytes.chunks(piece).enumerate();
    pieces.find_map(|(number, bytes)| {
        let (good, fault) = framing.follow(bytes).err()?;
        Some((number * piece + good, fault))
    })
}

fn get(fields: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n")
}

fn chunked(body: &str) -> String {
    get("Transfer-Encoding: chunked") + body
}

/// The fault is `expected`, wherever the pieces of the request end.
fn is_found(request: &str, expected: Option<FramingFault>) {
    let request = request.as_bytes();
    let whole = fault(request, request.len());
    let shown = String::from_utf8_lossy(&request[..request.len().min(200)]);
    assert_eq!(whole.map(|(_, fault)| fault), expected, "{shown}");
    for piece in [1, 2, 3, 7, 64, 100] {
        let pieces = fault(request, piece).map(|(_, fault)| fault);
        assert_eq!(pieces, expected, "in pieces of {piece}: {shown}");
    }
}

#[test]
fn what_servers_read_differently_is_a_fault_wherever_the_pieces_end() {
    let name = "X".repeat(257);
    let pad = " ".repeat(60);
    let zeros = "0".repeat(64);
    let extension = "a".repeat(300);
    let overhead = "1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n".repeat(1200);
    for (request, expected) in [
        (get("A: b"), None),
        (
            get("A: b").replace("\r\n", "\n"),
            Some(FramingFault::BareLf),
        ),
        (get("A: b\nC: d"), Some(FramingFault::BareLf)),
        (
            "GET / HTTP/1.1\r\nHost: a\n\n".to_owned(),
            Some(FramingFault::BareLf),
        ),
        ("\r\n\r\n".to_owned() + &get("A: b"), None),
        ("\nGET".to_owned(), Some(FramingFault::BareLf)),
        (
            get("A: b#").replace("/ ", "/#grpc "),
            Some(FramingFault::Fragment),
        ),
        (get("A: #\r\n#: b"), None),
        (get("Content-Length: 3") + "#\r\n" + &get("A: #"), None),
        (get(&format!("{name}: a")), Some(FramingFault::LongName)),
        (get(&name), Some(FramingFault::LongName)),
        (get(&format!("{}: a", &name[2..])), None),
        (get(&format!("A: {extension}")), None),
        (
            get(&format!("Content-Length:{pad}1")),
            Some(FramingFault::LongFraming),
        ),
        (get("Upgrade: WebSocket"), Some(FramingFault::Upgrade)),
        (get("Upgrade: h2c"), None),
        (get("Content-Length: 3") + "\n\n\n" + &get("A: b"), None),
        (
            get("Content-Length: 3") + "\n\n\n\nG",
            Some(FramingFault::BareLf),
        ),
        (
            get("content-length:0") + &get("A: b\n"),
            Some(FramingFault::BareLf),
        ),
        (chunked("3\r\n\n\n\n\r\n0\r\n\r\n") + &get("A: b"), None),
        (
            chunked("3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n") + &get("A: b"),
            None,
        ),
        (chunked("3\nabc\r\n"), Some(FramingFault::ChunkLine)),
        (
            chunked(&format!("3;{extension}\r\nabc\r\n")),
            Some(FramingFault::ChunkLine),
        ),
        (
            chunked(&format!("{zeros}3\r\nabc\r\n")),
            Some(FramingFault::ChunkLine),
        ),
        (chunked(&overhead), Some(FramingFault::ChunkLine)),
        (chunked(&"1\r\nx\r\n".repeat(9000)), None),
        (chunked("0\r\n\r\nGET\n"), Some(FramingFault::BareLf)),
        (
            "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n\n\n".to_owned(),
            None,
        ),
    ] {
        is_found(&request, expected);
    }
}

#[test]
fn a_trailer_is_a_field_like_those_of_the_head() {
    let long = "X: ".to_owned() + &"y".repeat(9000);
    let good = chunked("0\r\nX:\r\nY: a\tb é\r\n\r\n") + &get("A: b");
    is_found(&good, None);
    for bad in [
        "X: y\n\r\n",
        "X: y\r\n z: w\r\n\r\n",
        "X : y\r\n\r\n",
        ": y\r\n\r\n",
        "X\x01: y\r\n\r\n",
        "X: a\0b\r\n\r\n",
        "X: a\rb\r\n\r\n",
        &format!("{}: y\r\n\r\n", "x".repeat(300)),
        "nonsense\r\n\r\n",
        &long,
        &"X: y\r\n".repeat(2000),
    ] {
        let request = chunked(&format!("0\r\n{bad}"));
        is_found(&request, Some(FramingFault::Trailer));
    }
}

/// Requests without a fault, with bodies of any bytes, one behind the other.
fn requests() -> impl Strategy<Value = Vec<u8>> {
    let body = || vec(any::<u8>(), 0..200);
    let by_length = body().prop_map(|body| {
        let head = format!("POST / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        [head.into_bytes(), body].concat()
    });
    let chunked = vec(body(), 0..5).prop_map(|chunks| {
        let head = b"POST / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\n";
        let chunks = chunks.into_iter().filter(|chunk| !chunk.is_empty());
        let chunks = chunks.flat_map(|chunk| {
            let size = format!("{:x};a\r\n", chunk.len());
            [size.into_bytes(), chunk, b"\r\n".to_vec()].concat()
        });
        head.iter()
            .copied()
            .chain(chunks)
            .chain(*b"0\r\n\r\n")
            .collect()
    });
    let none = Just(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec());
    vec(prop_oneof![by_length, chunked, none], 0..6).prop_map(|all| all.concat())
}

#[test]
fn a_line_that_is_too_long_has_its_fault_at_the_same_byte_wherever_the_pieces_end() {
    let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let name = "X".repeat(300);
    let trailers = "0\r\nA: b\r\nX: ".to_owned() + &"y".repeat(9000);
    for (before, line, max, expected) in [
        (
            "GET / HTTP/1.1\r\n",
            &*name,
            NAME_MAX,
            FramingFault::LongName,
        ),
        (
            "GET / HTTP/1.1\r\n",
            &*format!("{name}: b\r\n"),
            NAME_MAX,
            FramingFault::LongName,
        ),
        (
            chunked,
            &*format!("1;{name}\r\n"),
            CHUNK_LINE_MAX,
            FramingFault::ChunkLine,
        ),
    ] {
        let request = format!("{before}{line}");
        for piece in 1..=request.len() {
            let found = fault(request.as_bytes(), piece);
            assert_eq!(found, Some((before.len() + max, expected)), "{piece}");
        }
    }
    let request = format!("{chunked}{trailers}");
    let whole = fault(request.as_bytes(), request.len());
    assert!(matches!(whole, Some((_, FramingFault::Trailer))));
    for piece in [1, 7, 300, 8192] {
        assert_eq!(fault(request.as_bytes(), piece), whole, "{piece}");
    }
}

proptest! {
    #[test]
    fn good_requests_have_no_fault_and_a_fault_behind_them_is_found(
        requests in requests(),
        piece in 1usize..300,
    ) {
        prop_assert_eq!(fault(&requests, piece), None);
        let good = requests.len();
        let bad = [&*requests, b"GET / HTTP/1.1\nHost: a\r\n\r\n"].concat();
        prop_assert_eq!(fault(&bad, piece), Some((good + 14, FramingFault::BareLf)));
    }

    #[test]
    fn any_bytes_end_somewhere(bytes in vec(any::<u8>(), 0..500), piece in 1usize..50) {
        let pieces = fault(&bytes, piece);
        prop_assert_eq!(pieces, fault(&bytes, 500));
    }
}
