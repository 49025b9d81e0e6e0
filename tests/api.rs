//! The POST to the API, against an API that answers, fails, hangs and goes away.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead as _, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use rustls::{ServerConnection, StreamOwned};
use waypost::{
    api::answer::{Answer, Outcome},
    api::{Api as Client, Settings},
    config,
    record::TraceHeaders,
};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    tls::{certificate, server},
};

const TIMEOUT: Duration = Duration::from_millis(500);
/// The longest wait for an event.
const PATIENCE: Duration = Duration::from_secs(20);

fn client(api: &Api) -> Client {
    let config = config::ApiConfig {
        url: api.url().into(),
        timeout: TIMEOUT,
        concurrency: 4,
        ..config::ApiConfig::default()
    };
    Client::new(&Settings::read("api", &config).unwrap())
}

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

async fn post(client: &Client) -> Answer {
    let trace = TraceHeaders::read(TRACE, Some("a=1"));
    client
        .post(
            Bytes::from_static(b"{\"path\":\"NATS\"}"),
            "key-1",
            trace.as_ref(),
        )
        .await
}

#[actix_rt::test]
async fn a_record_is_posted_with_its_id_and_trace() {
    let api = Api::start();
    assert_eq!(post(&client(&api)).await.outcome(), Outcome::Delivered);
    let posts = api.posts();
    assert_eq!(posts.len(), 1);
    assert_eq!(posts[0].body, "{\"path\":\"NATS\"}");
    assert_eq!(posts[0].key.as_deref(), Some("key-1"));
    assert_eq!(posts[0].traceparent.as_deref(), Some(TRACE));
    assert_eq!(posts[0].tracestate.as_deref(), Some("a=1"));
    assert_eq!(posts[0].content_type.as_deref(), Some("application/json"));
    assert_eq!(posts[0].authorization, None);
}

#[actix_rt::test]
async fn a_token_from_a_file_is_sent_as_bearer() {
    let api = Api::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "secret\n").unwrap();
    let config = config::ApiConfig {
        url: api.url().into(),
        token_file: Some(file.into()),
        ..config::ApiConfig::default()
    };
    post(&Client::new(&Settings::read("api", &config).unwrap())).await;
    assert_eq!(
        api.posts()[0].authorization.as_deref(),
        Some("Bearer secret")
    );
}

#[actix_rt::test]
async fn each_answer_is_told_with_its_start() {
    let api = Api::start();
    api.behave(|number, _| match number {
        0 => Conduct::AnswerWith {
            status: 400,
            headers: vec![],
            body: vec![b'x'; 3000],
        },
        1 => Conduct::AnswerWith {
            status: 503,
            headers: vec![("Retry-After", "7".into())],
            body: b"later".to_vec(),
        },
        2 => Conduct::AnswerWith {
            status: 307,
            headers: vec![("Location", "/elsewhere".into())],
            body: vec![],
        },
        3 => Conduct::AnswerWith {
            status: 301,
            headers: vec![("Location", "/".repeat(2000))],
            body: b"moved".to_vec(),
        },
        4 => Conduct::AnswerWith {
            status: 302,
            headers: vec![("Location", "/login".into())],
            body: vec![b'x'; 3000],
        },
        5 => Conduct::AnswerWith {
            status: 308,
            headers: vec![],
            body: b"somewhere".to_vec(),
        },
        6 => Conduct::AnswerWith {
            status: 410,
            headers: vec![],
            body: b"moved away".to_vec(),
        },
        _ => Conduct::AnswerWith {
            status: 201,
            headers: vec![],
            body: b"stored".to_vec(),
        },
    });
    let client = client(&api);
    let status = |status, retry_after, excerpt| Answer::Status {
        status,
        is_retryable: status == 503,
        retry_after,
        excerpt,
    };
    assert_eq!(post(&client).await, status(400, None, "x".repeat(1024)));
    assert_eq!(
        post(&client).await,
        status(503, Some(Duration::from_secs(7)), "later".into())
    );
    assert_eq!(
        post(&client).await,
        status(307, None, "Location: /elsewhere".into()),
        "a redirect is not followed"
    );
    let cut = |text: &str| text[..1024].to_owned();
    for (redirect, excerpt) in [
        (301, cut(&format!("Location: {}", "/".repeat(2000)))),
        (302, cut(&format!("Location: /login\n{}", "x".repeat(3000)))),
        (308, "somewhere".into()),
        (
            410,
            "the API is gone: it asks for no more POSTs\nmoved away".into(),
        ),
    ] {
        assert_eq!(post(&client).await, status(redirect, None, excerpt));
    }
    assert_eq!(post(&client).await, status(201, None, String::new()));
    assert_eq!(api.count(), 8);
}

#[actix_rt::test]
async fn an_api_that_hangs_is_given_up_after_the_time_out_and_asked_again() {
    let api = Api::start();
    api.behave(|number, _| {
        if number == 0 {
            Conduct::Hang
        } else {
            Conduct::Answer(200)
        }
    });
    let client = client(&api);
    let answer = post(&client).await;
    assert!(
        matches!(&answer, Answer::NoAnswer { why, .. } if why.contains("500ms")),
        "{answer:?}"
    );
    assert_eq!(answer.outcome(), Outcome::Retry { at_least: None });
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
}

#[actix_rt::test]
async fn an_answer_that_is_cut_short_counts_by_its_status() {
    let api = Api::start();
    api.behave(|number, _| {
        if number == 0 {
            Conduct::CutAnswer
        } else {
            Conduct::Answer(200)
        }
    });
    let client = client(&api);
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
}

#[actix_rt::test]
async fn an_api_that_is_away_is_no_answer_and_is_found_again() {
    let mut api = Api::start();
    let client = client(&api);
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
    api.stop().await;
    // A worker that is stopping may answer once more.
    let away = async || matches!(post(&client).await, Answer::NoAnswer { .. }).then_some(());
    eventually("the API is away", PATIENCE, away).await;
    api.start_again();
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
}

#[actix_rt::test]
async fn connections_are_kept_alive_and_no_more_than_the_posts_in_flight() {
    let api = Api::start();
    api.behave(|_, _| Conduct::AnswerWith {
        status: 200,
        headers: vec![],
        body: b"a body to read".to_vec(),
    });
    let client = client(&api);
    for _ in 0..50 {
        let answers = join_all((0..4).map(|_| post(&client))).await;
        assert!(
            answers
                .iter()
                .all(|answer| answer.outcome() == Outcome::Delivered)
        );
    }
    let connections: HashSet<_> = api
        .posts()
        .into_iter()
        .filter_map(|post| post.peer)
        .collect();
    assert!(
        connections.len() <= 4,
        "{} connections for 4 POSTs at a time",
        connections.len()
    );
}

/// Reads one request, whole or as far as it comes.
fn read_request(stream: &mut impl Read) {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) <= 2 {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    reader.read_exact(&mut vec![0; length]).ok();
}

/// A server on raw sockets. `serve` gets the number of each connection, from 0, and the connection.
fn by_hand(serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> (String, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(number, stream.expect("an accepted connection")));
        }
    });
    (format!("http://127.0.0.1:{port}/"), port)
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn client_of(url: String, concurrency: usize) -> Client {
    let config = config::ApiConfig {
        url: url.into(),
        timeout: TIMEOUT,
        concurrency,
        ..config::ApiConfig::default()
    };
    Client::new(&Settings::read("api", &config).unwrap())
}

#[actix_rt::test]
async fn a_connection_that_the_api_closes_under_a_post_is_replaced_at_once() {
    let (url, _) = by_hand(|number, mut stream| {
        read_request(&mut stream);
        stream.write_all(OK).unwrap();
        if number == 0 {
            // The second POST arrives, and the connection ends instead of an answer.
            read_request(&mut stream);
        } else {
            read_request(&mut stream);
            stream.write_all(OK).unwrap();
        }
    });
    let client = client_of(url, 1);
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
    assert_eq!(
        post(&client).await.outcome(),
        Outcome::Delivered,
        "by a second connection, without a retry by the caller"
    );
}

#[actix_rt::test]
async fn an_api_that_always_closes_is_asked_twice_and_no_more() {
    let (counted, connections) = std::sync::mpsc::channel();
    let (url, _) = by_hand(move |number, mut stream| {
        read_request(&mut stream);
        counted.send(number).unwrap();
    });
    assert!(matches!(
        post(&client_of(url, 1)).await,
        Answer::NoAnswer { .. }
    ));
    assert_eq!(connections.try_iter().collect::<Vec<_>>(), [0, 1]);
}

#[actix_rt::test]
async fn an_api_that_refuses_a_body_before_it_has_read_it_is_understood() {
    const REFUSAL: &[u8] = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig";
    let (url, _) = by_hand(|_, mut stream| {
        let mut start = [0; 512];
        assert!(stream.read(&mut start).unwrap() > 0);
        stream.write_all(REFUSAL).unwrap();
        // The drop closes the connection with bytes that were not read, which resets it.
    });
    let client = client_of(url, 1);
    let refused = Answer::Status {
        status: 413,
        is_retryable: false,
        retry_after: None,
        excerpt: "big".into(),
    };
    for size in [1 << 10, 8 << 10, 256 << 10, 16 << 20] {
        let body = Bytes::from(vec![b' '; size]);
        let answer = client.post(body, "key-1", None).await;
        assert_eq!(answer, refused, "{size} bytes");
    }
}

#[actix_rt::test]
async fn a_large_body_that_lost_its_connection_is_sent_once_the_api_asks_for_it() {
    const SIZE: usize = 16 << 20;
    let (url, _) = by_hand(|number, mut stream| {
        if number == 0 {
            // Dropped with bytes that were not read.
            assert!(stream.read(&mut [0; 512]).unwrap() > 0);
            return;
        }
        let mut head = vec![0; 512];
        let length = stream.read(&mut head).unwrap();
        let head = String::from_utf8_lossy(&head[..length]).to_ascii_lowercase();
        assert!(head.contains("expect: 100-continue\r\n"), "{head}");
        assert!(head.contains("idempotency-key: key-1\r\n"), "{head}");
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        stream.read_exact(&mut vec![0; SIZE]).unwrap();
        stream.write_all(OK).unwrap();
    });
    let body = Bytes::from(vec![b' '; SIZE]);
    let answer = client_of(url, 1).post(body, "key-1", None).await;
    assert_eq!(answer.outcome(), Outcome::Delivered, "{answer:?}");
}

#[actix_rt::test]
async fn an_answer_whose_body_does_not_end_counts_by_its_status() {
    let (url, _) = by_hand(|number, mut stream| {
        read_request(&mut stream);
        let head = if number == 0 {
            "HTTP/1.1 200 OK"
        } else {
            "HTTP/1.1 422 No"
        };
        write!(stream, "{head}\r\ncontent-length: 100\r\n\r\nso far").unwrap();
        // Ends when the client gives up.
        stream.read_to_end(&mut Vec::new()).ok();
    });
    let client = client_of(url, 1);
    assert_eq!(
        post(&client).await.outcome(),
        Outcome::Delivered,
        "the API has said that it has the record"
    );
    // The limit is one connection, so this one has an answer only if the first was given back.
    let refused = Answer::Status {
        status: 422,
        is_retryable: false,
        retry_after: None,
        excerpt: "so far".into(),
    };
    assert_eq!(post(&client).await, refused);
}

#[actix_rt::test]
async fn an_answer_without_end_is_not_read_beyond_its_bound() {
    let (told, written) = std::sync::mpsc::channel();
    let (url, _) = by_hand(move |_, mut stream| {
        read_request(&mut stream);
        stream
            .write_all(b"HTTP/1.1 500 No\r\ncontent-length: 1000000000\r\n\r\n")
            .unwrap();
        let mut sent = 0;
        while stream.write_all(&[b'x'; 4096]).is_ok() {
            sent += 4096;
        }
        told.send(sent).unwrap();
    });
    let answer = post(&client_of(url, 1)).await;
    assert_eq!(
        answer,
        Answer::Status {
            status: 500,
            is_retryable: true,
            retry_after: None,
            excerpt: "x".repeat(1024)
        }
    );
    let sent: usize = written
        .recv_timeout(Duration::from_secs(10))
        .expect("the client closes the connection");
    assert!(
        sent < 64 << 20,
        "{sent} bytes left the server: what socket buffers hold, and no more"
    );
}

#[actix_rt::test]
async fn a_server_that_takes_connections_and_says_nothing_is_given_up() {
    let (url, _) = by_hand(|_, mut stream| {
        stream.read_to_end(&mut Vec::new()).ok();
    });
    let answer = post(&client_of(url, 1)).await;
    assert!(
        matches!(&answer, Answer::NoAnswer { why, .. } if why.contains("500ms")),
        "{answer:?}"
    );
}

/// POSTs twice to a server. Its first connection sends `first`, and `late` 50 ms later; all others
/// answer 500.
async fn two_answers(first: &'static [u8], late: &'static [u8]) -> [Answer; 2] {
    let (url, _) = by_hand(move |number, mut stream| {
        read_request(&mut stream);
        if number > 0 {
            let head = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n";
            return stream.write_all(head).unwrap();
        }
        stream.write_all(first).unwrap();
        thread::sleep(Duration::from_millis(50));
        // The client may have closed the connection by now.
        stream.write_all(late).ok();
        stream.read_to_end(&mut Vec::new()).ok();
    });
    let client = client_of(url, 1);
    [post(&client).await, post(&client).await]
}

#[actix_rt::test]
async fn an_interim_answer_is_no_answer_and_its_rest_answers_no_other_post() {
    let [first, second] = two_answers(b"HTTP/1.1 103 Early Hints\r\n\r\n", OK).await;
    assert!(
        matches!(&first, Answer::NoAnswer { why, .. } if why.contains("103")),
        "{first:?}"
    );
    assert!(
        matches!(second, Answer::Status { status: 500, .. }),
        "{second:?}"
    );
}

#[actix_rt::test]
async fn the_body_of_an_answer_without_a_length_answers_no_other_post() {
    let [first, second] = two_answers(b"HTTP/1.1 400 No\r\n\r\n", OK).await;
    assert_eq!(first.outcome(), Outcome::Refused, "{first:?}");
    assert!(
        matches!(second, Answer::Status { status: 500, .. }),
        "{second:?}"
    );
}

#[actix_rt::test]
async fn an_answer_that_cannot_be_read_is_no_answer() {
    let too_many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(97));
    for head in [too_many, "HTTP/1.1 no status\r\n\r\n".into()] {
        let (url, _) = by_hand(move |_, mut stream| {
            read_request(&mut stream);
            stream.write_all(head.as_bytes()).unwrap();
        });
        let answer = post(&client_of(url, 1)).await;
        assert!(
            matches!(&answer, Answer::NoAnswer { why, .. } if why.starts_with("the answer cannot be used: ")),
            "{answer:?}"
        );
    }
}

#[actix_rt::test]
async fn an_idle_connection_is_replaced_before_the_api_closes_it() {
    let api = Api::start();
    let client = client(&api);
    post(&client).await;
    tokio::time::sleep(Duration::from_millis(4100)).await;
    post(&client).await;
    let posts = api.posts();
    assert_ne!(posts[0].peer, posts[1].peer);
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let garbage = folder.path().join("garbage");
    let empty = folder.path().join("empty");
    fs::write(&garbage, "two\nlines").unwrap();
    fs::write(&empty, "\n").unwrap();
    let api = config::ApiConfig::default;
    for (config, name) in [
        (
            config::ApiConfig {
                token_file: Some(missing.clone().into()),
                ..api()
            },
            "missing",
        ),
        (
            config::ApiConfig {
                token_file: Some(garbage.clone().into()),
                ..api()
            },
            "garbage",
        ),
        (
            config::ApiConfig {
                token_file: Some(empty.into()),
                ..api()
            },
            "empty",
        ),
        (
            config::ApiConfig {
                ca_file: Some(missing.into()),
                ..api()
            },
            "missing",
        ),
        (
            config::ApiConfig {
                ca_file: Some(garbage.into()),
                ..api()
            },
            "garbage",
        ),
        (
            config::ApiConfig {
                url: "http://a b/".into(),
                ..api()
            },
            "http://a b/",
        ),
    ] {
        let why = Settings::read("api", &config)
            .err()
            .map(|why| why.to_string())
            .unwrap_or_default();
        assert!(why.contains(name), "{config:?}: {why:?}");
    }
}

#[actix_rt::test]
async fn https_is_spoken_with_apis_whose_certificate_is_trusted_and_with_no_others() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let folder = tempfile::tempdir().unwrap();
    let Some((cert, key)) = certificate(folder.path(), "DNS:localhost") else {
        return;
    };
    let tls = server(&cert, &key);
    let (_, port) = by_hand(move |_, stream| {
        let mut stream = StreamOwned::new(ServerConnection::new(Arc::clone(&tls)).unwrap(), stream);
        read_request(&mut stream);
        // Fails if the client has refused the certificate.
        stream.write_all(OK).ok();
    });
    for (host, ca_file, trusted) in [
        ("localhost", Some(cert.clone()), true),
        ("localhost", None, false),
        ("127.0.0.1", Some(cert), false),
    ] {
        let url = format!("https://{host}:{port}/");
        let timeout = Duration::from_secs(5);
        let config = config::ApiConfig {
            url: url.clone().into(),
            ca_file: ca_file.map(Into::into),
            timeout,
            ..config::ApiConfig::default()
        };
        let answer = post(&Client::new(&Settings::read("api", &config).unwrap())).await;
        assert_eq!(
            answer.outcome() == Outcome::Delivered,
            trusted,
            "{url}: {answer:?}"
        );
        assert!(
            trusted || matches!(&answer, Answer::NoAnswer { .. }),
            "{url}: {answer:?}"
        );
    }
}
