use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::{advance, sleep, timeout},
};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(5);

fn connection() -> (CheckedStream<DuplexStream>, DuplexStream) {
    let (ours, clients) = duplex(1024);
    (
        CheckedStream::new(ours, None, Instant::now(), TIMEOUT, EarlyEnds::default()),
        clients,
    )
}

/// How long the stream goes on while a byte comes each second, up to a minute.
async fn lasts(stream: &mut CheckedStream<DuplexStream>, client: &mut DuplexStream) -> Duration {
    let began = Instant::now();
    let read = async {
        let mut bytes = [0; 16];
        while stream.read(&mut bytes).await.unwrap() > 0 {}
    };
    let send = async {
        loop {
            client.write_all(b"x").await.unwrap();
            sleep(Duration::from_secs(1)).await;
        }
    };
    timeout(Duration::from_mins(1), async {
        tokio::select! { () = read => {}, () = send => {} }
    })
    .await
    .ok();
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn each_head_has_the_same_time_from_its_first_byte_on() {
    let (mut stream, mut client) = connection();
    let state = stream.state();
    for _ in 0..3 {
        // The timer of an earlier head fires in between.
        for rest in [0, 1, 4, 7] {
            client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            let mut head = [0; 18];
            stream.read_exact(&mut head).await.unwrap();
            state.complete();
            sleep(Duration::from_secs(rest)).await;
            state.answered(true);
            // Nothing comes for longer than a head may take.
            let idle = timeout(2 * TIMEOUT, stream.read(&mut head)).await;
            assert!(idle.is_err(), "an idle connection has no head");
        }
    }
    assert_eq!(lasts(&mut stream, &mut client).await, TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_body_has_the_same_time_from_the_answer_on() {
    for sends in [false, true] {
        let (mut stream, mut client) = connection();
        let head = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.write_all(head).await.unwrap();
        let mut read = [0; 64];
        assert_eq!(stream.read(&mut read).await.unwrap(), head.len());
        stream.state().complete();
        // It looks again after the answer, which wakes nobody.
        let early = timeout(TIMEOUT / 2, stream.read(&mut read)).await;
        assert!(early.is_err());
        stream.state().answered(true);
        if sends {
            client.write_all(b"1\r\nx").await.unwrap();
            assert_eq!(stream.read(&mut read).await.unwrap(), 4);
        }
        let began = Instant::now();
        assert_eq!(stream.read(&mut read).await.unwrap(), 0);
        assert_eq!(began.elapsed(), TIMEOUT);
        stream.shutdown().await.unwrap();
        drop(stream);
        let mut answers = String::new();
        client.read_to_string(&mut answers).await.unwrap();
        assert_eq!(answers, "", "it has its answer");
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_head_begins_with_the_connection() {
    let (mut stream, mut client) = connection();
    assert_eq!(lasts(&mut stream, &mut client).await, TIMEOUT);
    let (mut stream, _client) = connection();
    let began = Instant::now();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(began.elapsed(), TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn a_request_in_service_is_not_timed() {
    let (mut stream, mut client) = connection();
    stream.state().complete();
    let minute = Duration::from_mins(1);
    assert_eq!(lasts(&mut stream, &mut client).await, minute);
}

#[tokio::test(start_paused = true)]
async fn a_request_behind_the_last_answer_is_none_and_the_answer_is_not_cut() {
    let (ours, mut client) = duplex(16);
    let mut stream = CheckedStream::new(ours, None, Instant::now(), TIMEOUT, EarlyEnds::default());
    let state = stream.state();
    assert!(state.complete());
    state.answered(true);
    assert!(state.complete());
    state.answered(false);
    assert!(!state.complete());
    assert!(!state.complete());
    let answer = "an answer that is longer than the room";
    let write = async {
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        // Bytes that the client sends meanwhile are read and not seen.
        let ended = stream.read(&mut [0; 16]).await;
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    };
    let read = async {
        let mut read = String::new();
        client.write_all(b"more").await.unwrap();
        client.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, answer);
    };
    tokio::join!(write, read);
}

#[tokio::test(start_paused = true)]
async fn bytes_that_never_pause_do_not_help() {
    let (mut stream, mut client) = connection();
    client.write_all(&[b'x'; 64]).await.unwrap();
    let mut byte = [0];
    assert_eq!(stream.read(&mut byte).await.unwrap(), 1);
    advance(TIMEOUT).await;
    // There is more, and nothing is waited for.
    assert_eq!(stream.read(&mut byte).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_late_head_is_answered_behind_the_answers_before_it() {
    let (mut stream, mut client) = connection();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    drop(stream);
    let mut answers = String::new();
    client.read_to_string(&mut answers).await.unwrap();
    let late = answers.strip_prefix("HTTP/1.1 200 OK\r\n\r\n").unwrap();
    assert!(
        late.starts_with("HTTP/1.1 408 Request Timeout\r\n"),
        "{late}"
    );
    assert!(late.ends_with('}'), "{late}");

    let (mut stream, mut client) = connection();
    stream.shutdown().await.unwrap();
    drop(stream);
    client.read_to_string(&mut answers).await.unwrap();
    let late = answers.matches("HTTP/1.1 408").count();
    assert_eq!(late, 1, "only a late one");
}

#[tokio::test(start_paused = true)]
async fn a_fault_behind_the_last_answer_gets_none() {
    for goes_on in [true, false] {
        let (mut stream, mut client) = connection();
        let request = b"GET / HTTP/1.1\r\n\r\n";
        let sent = [&request[..], b"GET / HTTP/1.1\n"].concat();
        client.write_all(&sent).await.unwrap();
        stream.read_exact(&mut [0; 18]).await.unwrap();
        let state = stream.state();
        assert!(state.complete());
        // The fault is known before the answer is there.
        while stream.read(&mut [0; 64]).await.unwrap() > 0 {}
        state.answered(goes_on);
        stream.write_all(b"the answer").await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream);
        let mut answers = String::new();
        client.read_to_string(&mut answers).await.unwrap();
        let rest = answers.strip_prefix("the answer").expect("it comes first");
        assert_eq!(rest.starts_with("HTTP/1.1 400 "), goes_on, "{rest}");
        assert_eq!(rest.is_empty(), !goes_on, "{rest}");
    }
}
