//! The POST to the API, against an API that answers, fails, hangs and goes away.

use std::{collections::HashSet, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use waypost::{
    config,
    delivery::{Answer, Outcome},
    http::api::{Api as Client, Settings},
};

use crate::support::api::{Api, Conduct};

const TIMEOUT: Duration = Duration::from_millis(500);

fn client(api: &Api) -> Client {
    let config = config::Api { url: api.url(), timeout: TIMEOUT, concurrency: 4, ..config::Api::default() };
    Client::new(&Settings::read(&config).unwrap())
}

async fn post(client: &Client) -> Answer {
    client.post(Bytes::from_static(b"{\"path\":\"NATS\"}"), "key-1", Some("00-1-2-01")).await
}

#[actix_rt::test]
async fn a_record_is_posted_with_its_id_and_trace() {
    let api = Api::start();
    assert_eq!(post(&client(&api)).await.outcome(), Outcome::Delivered);
    let posts = api.posts();
    assert_eq!(posts.len(), 1);
    assert_eq!(posts[0].body, "{\"path\":\"NATS\"}");
    assert_eq!(posts[0].key.as_deref(), Some("key-1"));
    assert_eq!(posts[0].traceparent.as_deref(), Some("00-1-2-01"));
    assert_eq!(posts[0].content_type.as_deref(), Some("application/json"));
    assert_eq!(posts[0].authorization, None);
}

#[actix_rt::test]
async fn a_token_from_a_file_is_sent_as_bearer() {
    let api = Api::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "secret\n").unwrap();
    let config = config::Api { url: api.url(), token_file: Some(file), ..config::Api::default() };
    post(&Client::new(&Settings::read(&config).unwrap())).await;
    assert_eq!(api.posts()[0].authorization.as_deref(), Some("Bearer secret"));
}

#[actix_rt::test]
async fn each_answer_is_told_with_its_start() {
    let api = Api::start();
    api.behave(|number, _| match number {
        0 => Conduct::AnswerWith { status: 400, headers: vec![], body: vec![b'x'; 3000] },
        1 => Conduct::AnswerWith { status: 503, headers: vec![("Retry-After", "7".into())], body: b"later".to_vec() },
        2 => Conduct::AnswerWith { status: 307, headers: vec![("Location", "/elsewhere".into())], body: vec![] },
        _ => Conduct::AnswerWith { status: 201, headers: vec![], body: b"stored".to_vec() },
    });
    let client = client(&api);
    let status = |status, retry_after, excerpt| Answer::Status { status, retry_after, excerpt };
    assert_eq!(post(&client).await, status(400, None, "x".repeat(1024)));
    assert_eq!(post(&client).await, status(503, Some(Duration::from_secs(7)), "later".into()));
    assert_eq!(post(&client).await, status(307, None, String::new()), "a redirect is not followed");
    assert_eq!(post(&client).await, status(201, None, String::new()));
    assert_eq!(api.count(), 4);
}

#[actix_rt::test]
async fn an_api_that_hangs_is_given_up_after_the_time_out_and_asked_again() {
    let api = Api::start();
    api.behave(|number, _| if number == 0 { Conduct::Hang } else { Conduct::Answer(200) });
    let client = client(&api);
    let answer = post(&client).await;
    assert!(matches!(&answer, Answer::NoAnswer(why) if why.contains("500ms")), "{answer:?}");
    assert_eq!(answer.outcome(), Outcome::Retry { at_least: None });
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
}

#[actix_rt::test]
async fn an_answer_that_is_cut_short_counts_by_its_status() {
    let api = Api::start();
    api.behave(|number, _| if number == 0 { Conduct::CutAnswer } else { Conduct::Answer(200) });
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
    assert!(matches!(post(&client).await, Answer::NoAnswer(_)));
    api.start_again();
    assert_eq!(post(&client).await.outcome(), Outcome::Delivered);
}

#[actix_rt::test]
async fn connections_are_kept_alive_and_no_more_than_the_posts_in_flight() {
    let api = Api::start();
    api.behave(|_, _| Conduct::AnswerWith { status: 200, headers: vec![], body: b"a body to read".to_vec() });
    let client = client(&api);
    for _ in 0..50 {
        let answers = join_all((0..4).map(|_| post(&client))).await;
        assert!(answers.iter().all(|answer| answer.outcome() == Outcome::Delivered));
    }
    let connections: HashSet<_> = api.posts().into_iter().filter_map(|post| post.peer).collect();
    assert!(connections.len() <= 4, "{} connections for 4 POSTs at a time", connections.len());
}
