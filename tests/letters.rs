//! Dead letters by what is known of them: a query, its count, and an order to those that match.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    process::waypost,
    traffic,
};

/// A node with dead letters: `gone-0` to `gone-4`, refused with 410 and an answer, and later `bad-0`
/// to `bad-9`, refused with 422. They have died in this order, the first bad one in a later
/// millisecond than all before it.
async fn node(api: &Api) -> Node {
    api.behave(|_, post| match post.key.as_deref() {
        Some(key) if key.starts_with("gone") => Conduct::AnswerWith {
            status: 410,
            headers: Vec::new(),
            body: b"it was moved".to_vec(),
        },
        Some(key) if key.starts_with("bad") => Conduct::Answer(422),
        _ => Conduct::Answer(200),
    });
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut ended = 0;
    for (name, count) in [("gone", 5), ("bad", 10)] {
        let began_ms = query(&node, "limit=0").await["at_ms"].as_u64();
        eventually("the node's clock goes on", PATIENCE, async || {
            let now_ms = query(&node, "limit=0").await["at_ms"].as_u64();
            (now_ms > began_ms).then_some(())
        })
        .await;
        for number in 0..count {
            let key = format!("{name}-{number}");
            node.post("/", &key, traffic()[number].clone())
                .await
                .expect("an answer");
            // The node POSTs several at a time, and each dies with its answer.
            ended += 1;
            node.all_ended(ended, PATIENCE).await;
        }
    }
    node
}

async fn query(node: &Node, query: &str) -> Value {
    let (status, list) = node
        .get(&format!("/api/dead?{query}"))
        .await
        .expect("an answer");
    assert_eq!(status, 200, "{list}");
    list
}

fn ids(list: &Value) -> BTreeSet<&str> {
    let letters = list["dead"].as_array().expect("a list");
    letters
        .iter()
        .map(|letter| letter["id"].as_str().expect("an id"))
        .collect()
}

#[actix_rt::test]
async fn a_query_counts_all_that_match_and_lists_the_oldest() {
    let api = Api::start();
    let node = node(&api).await;
    let all = query(&node, "limit=3").await;
    assert_eq!((&all["total"], &all["matching"]), (&json!(15), &json!(15)));
    assert_eq!(ids(&all), ["gone-0", "gone-1", "gone-2"].into());
    let at_ms = all["at_ms"].as_u64().expect("a time");
    let middle = query(&node, "id=bad-0").await["dead"][0]["dead_ms"]
        .as_u64()
        .expect("a time");
    for (filter, matching) in [
        ("status=422".to_owned(), 10),
        ("status=410".to_owned(), 5),
        ("status=0".to_owned(), 0),
        ("text=moved".to_owned(), 5),
        ("text=gone-".to_owned(), 5),
        ("id=gone-1".to_owned(), 1),
        ("id=gone".to_owned(), 0),
        ("lane=grpc".to_owned(), 15),
        ("lane=nats".to_owned(), 0),
        ("given_up=false".to_owned(), 15),
        ("given_up=true".to_owned(), 0),
        (format!("until_ms={}", at_ms + 1), 15),
        (format!("since_ms={}", at_ms + 1), 0),
        (format!("since_ms={middle}&status=410"), 0),
        (format!("since_ms={middle}&status=422"), 10),
        ("status=422&text=bad-3".to_owned(), 1),
    ] {
        let found = query(&node, &format!("limit=2&{filter}")).await;
        assert_eq!(found["matching"], matching, "{filter}: {found}");
        assert_eq!(found["total"], 15, "{filter}");
        let listed = found["dead"].as_array().expect("a list").len();
        assert_eq!(listed, matching.min(2), "{filter}");
    }
    let brief = query(&node, "records=false&id=gone-1").await;
    assert_eq!(brief["dead"][0]["record"], Value::Null);
    let whole = query(&node, "id=gone-1").await;
    let record = whole["dead"][0]["record"].as_str().expect("a record");
    assert_eq!(record.as_bytes(), traffic()[1]);
    let none = query(&node, "parked=true&status=422").await;
    assert_eq!(
        (&none["matching"], &none["parked"]),
        (&json!(0), &json!([]))
    );
}

/// The node has no list of all in its memory, however many are asked for.
#[actix_rt::test]
async fn a_list_of_large_letters_ends_early_and_goes_on_from_there() {
    const LETTERS: usize = 45;
    const LIST_BYTES: usize = 8 << 20;
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut record: Value = serde_json::from_slice(&traffic()[0]).expect("JSON");
    record["more"] = "x".repeat(240 << 10).into();
    let body = Bytes::from(record.to_string());
    for number in 0..LETTERS {
        let key = format!("large-{number}");
        let posted = node.post("/", &key, body.clone()).await;
        assert_eq!(posted.expect("an answer").0, 202);
    }
    node.all_ended(LETTERS, PATIENCE).await;
    for filter in ["", "&status=422"] {
        let (mut found, mut after) = (Vec::new(), String::new());
        loop {
            let path = format!("limit=10000{filter}{after}");
            let page = query(&node, &path).await;
            assert_eq!(page["matching"], LETTERS, "{filter}");
            let on_page = page["dead"].as_array().expect("a list");
            let ids = on_page.iter().map(|letter| letter["id"].clone());
            found.extend(ids);
            let size = on_page.len() * body.len();
            assert!(size <= LIST_BYTES + body.len(), "{size} bytes");
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => break,
            }
            assert!(size + body.len() >= LIST_BYTES, "{size} bytes");
        }
        assert_eq!(found.len(), LETTERS, "each once: {found:?}");
        let ids: BTreeSet<_> = found.iter().map(Value::to_string).collect();
        assert_eq!(ids.len(), LETTERS);
    }
    // Without the records all have room.
    let brief = query(&node, "limit=10000&records=false").await;
    assert_eq!((ids(&brief).len(), &brief["next"]), (LETTERS, &Value::Null));
    let admin = format!("http://127.0.0.1:{}", node.admin);
    let arguments = ["dead", "list", "--all", "--json", "--admin", &admin];
    let (_, listed, problem) = waypost(&arguments).await;
    let listed: Value = serde_json::from_str(&listed).expect(&problem);
    assert_eq!(
        (ids(&listed).len(), &listed["next"]),
        (LETTERS, &Value::Null)
    );
    let (status, problem) = node
        .get("/api/dead?after=nonsense")
        .await
        .expect("an answer");
    assert_eq!((status.as_u16(), &problem["status"]), (400, &json!(400)));
}

/// A node in whose place `answer` answers each request, with the pause that it asks for.
fn busy_node(answer: impl Fn(usize) -> (u16, Value) + Send + 'static) -> Api {
    let node = Api::start();
    node.behave(move |asked, _| {
        let (status, body) = answer(asked);
        Conduct::AnswerWith {
            status,
            headers: vec![("Retry-After", "0".to_owned())],
            body: body.to_string().into_bytes(),
        }
    });
    node
}

#[actix_rt::test]
async fn a_node_that_is_busy_between_two_pages_is_asked_again_and_nothing_is_lost() {
    let page = |id: &str, next: Option<&str>| json!({"total": 2, "matching": 2, "next": next, "dead": [{"id": id}]});
    let busy = json!({"detail": "another search reads the spool"});
    let pages = [page("a", Some("0-2-1-0-0")), page("b", None)];
    let answers = [&pages[0], &busy, &busy, &pages[1]].map(Value::clone);
    let node = busy_node(move |asked| {
        let status = if matches!(asked, 1 | 2) { 503 } else { 200 };
        (status, answers[asked].clone())
    });
    let arguments = ["dead", "list", "--text", "x", "--json", "--admin"];
    let url = node.url();
    let (status, listed, told) = waypost(&[&arguments[..], &[&url]].concat()).await;
    assert_eq!((status, node.count()), (Some(0), 4), "{told}");
    let listed: Value = serde_json::from_str(&listed).expect(&told);
    assert_eq!(ids(&listed), ["a", "b"].into());
    assert_eq!(told.matches("another search reads the spool").count(), 2);

    // Not without end.
    let node = busy_node(move |_| (503, busy.clone()));
    let url = node.url();
    let (status, listed, told) = waypost(&[&arguments[..], &[&url]].concat()).await;
    assert_eq!((status, &*listed), (Some(1), ""), "{told}");
    assert_eq!(node.count(), 5, "{told}");
}

#[actix_rt::test]
async fn an_order_takes_those_that_match_up_to_its_limit() {
    let api = Api::start();
    let node = node(&api).await;
    let order = async |action: &str, order: Value| {
        let (status, answer) = node
            .tell(&format!("/api/dead/{action}"), order.clone())
            .await;
        assert_eq!(status, 200, "{order}: {answer}");
        answer
    };
    let gone = json!({"status": 410});
    let dropped = order("drop", json!({"filter": gone, "limit": 2})).await;
    assert_eq!(dropped, json!({"dropped": 2}));
    let left = query(&node, "status=410").await;
    assert_eq!(ids(&left), ["gone-2", "gone-3", "gone-4"].into());
    let none = order("drop", json!({"filter": {"lane": "nats"}})).await;
    assert_eq!(none, json!({"dropped": 0}));

    // Mended, it takes what is sent again, and nothing else is.
    api.behave(|_, _| Conduct::Answer(200));
    let posted = api.count();
    let one = order("replay", json!({"filter": {"text": "bad-3"}})).await;
    assert_eq!(one, json!({"replayed": 1}));
    let some = order("replay", json!({"filter": {"status": 422}, "limit": 4})).await;
    assert_eq!(some, json!({"replayed": 4}));
    api.wait_for(posted + 5, PATIENCE).await;
    eventually("they are delivered", PATIENCE, async || {
        let ledger = node.status().await["ledger"].clone();
        (ledger["delivered"] == 5 && ledger["dead"] == 8).then_some(())
    })
    .await;
    assert_eq!(api.count(), posted + 5);
    let rest = order("replay", json!({"filter": {"until_ms": u64::MAX}})).await;
    assert_eq!(rest, json!({"replayed": 8}));
}

#[actix_rt::test]
async fn an_order_of_an_unclear_choice_touches_nothing() {
    let api = Api::start();
    let node = node(&api).await;
    for (choice, kind) in [
        (json!({}), "selection"),
        (json!({"filter": {}}), "selection"),
        (json!({"all": true, "filter": {"status": 422}}), "selection"),
        (
            json!({"ids": ["bad-0"], "filter": {"status": 422}}),
            "selection",
        ),
        (
            json!({"filter": [null, "grpc", null, null, null, null, null]}),
            "json",
        ),
        (json!({"all": true, "limit": 1}), "selection"),
        (json!({"ids": ["bad-0", "bad-1"], "limit": 1}), "selection"),
        (json!({"filter": {}, "limit": 1}), "selection"),
        (json!({"filter": {"colour": "red"}}), "json"),
        (json!({"filter": {"status": "422"}}), "json"),
    ] {
        for action in ["replay", "drop"] {
            let path = format!("/api/dead/{action}");
            let (status, problem) = node.tell(&path, choice.clone()).await;
            assert_eq!(status, 400, "{choice}: {problem}");
            assert_eq!(
                problem["type"],
                format!("urn:waypost:problem:{kind}"),
                "{choice}"
            );
        }
    }
    assert_eq!(query(&node, "").await["total"], 15);
    let (status, problem) = node.get("/api/dead?state=422").await.expect("an answer");
    assert_eq!(status, 400, "{problem}");
}

#[actix_rt::test]
async fn the_command_line_shows_a_plan_and_carries_it_out_with_yes() {
    let api = Api::start();
    let node = node(&api).await;
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    let dead = async |arguments: &[&str]| {
        waypost(&[&["dead", "--admin", admin], arguments].concat()).await
    };
    let (_, json, _) = dead(&["list", "--reason", "410", "--json"]).await;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((ids(&json).len(), &json["matching"]), (5, &json!(5)));
    let (_, table, _) = dead(&["list", "--text", "moved", "--limit", "2"]).await;
    assert!(table.contains("2 of 5 dead letters shown"), "{table}");
    let (_, table, _) = dead(&["list", "--lane", "nats"]).await;
    assert_eq!(table, "0 dead letters\n");
    let (status, table, told) = dead(&["list", "gone-1", "bad-2", "nobody", "bad-2"]).await;
    assert_eq!(table.lines().count(), 4, "{table}");
    assert_eq!(
        (status, &*told),
        (Some(1), "waypost: 1 of 3 ids name no dead letter\n")
    );

    let plan = "Plan: drop 5 of 15 on disk: dead letters with status 410\n";
    let nothing = "waypost: nothing is dropped: --yes goes on\n";
    let drop_gone = &["drop", "--reason", "410"][..];
    let (status, printed, told) = dead(drop_gone).await;
    assert_eq!((status, &*printed), (Some(1), ""));
    assert_eq!(told, [plan, nothing].concat());
    let (status, printed, _) = dead(&[drop_gone, &["--json"]].concat()).await;
    let expected = "{\"matching\":5,\"total\":15}\n";
    assert_eq!((status, &*printed), (Some(1), expected));
    for all in ["drop", "replay"] {
        assert_eq!(dead(&[all, "--all"]).await.0, Some(1), "{all}");
    }
    assert_eq!(node.dead().await.len(), 15, "a plan touches nothing");

    let (status, printed, told) = dead(&[drop_gone, &["--yes"]].concat()).await;
    assert_eq!((status, &*printed, &*told), (Some(0), "5 dropped\n", plan));
    let (_, printed, _) = dead(&["drop", "--since", "1h", "--text", "bad-3", "--yes"]).await;
    assert_eq!(printed, "1 dropped\n");
    let (_, printed, _) = dead(&["drop", "--until", "1h", "--yes"]).await;
    assert_eq!(printed, "0 dropped\n", "none is as old");
    let left = node.dead().await;
    assert!(left.len() == 9 && !left.contains("bad-3"), "{left:?}");
    api.behave(|_, _| Conduct::Answer(200));
    let (_, printed, _) = dead(&["replay", "--all", "--yes", "--json"]).await;
    assert_eq!(printed, "{\"replayed\":9}\n");
    api.wait_for(24, PATIENCE).await;

    for wrong in [
        &["drop"][..],
        &["replay", "--yes"],
        &["drop", "a", "--all"],
        &["drop", "a", "--lane", "grpc"],
        &["list", "--reason", "sad"],
        &["list", "--since", "soon"],
    ] {
        let (status, _, told) = dead(wrong).await;
        assert_eq!(status, Some(2), "{wrong:?}");
        assert!(told.starts_with("waypost: "), "{told}");
    }
}

#[actix_rt::test]
async fn an_order_for_many_letters_goes_by_steps_and_tells_how_far_it_is() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let records = traffic();
    let body = [b"[", &records[..600].join(&b","[..])[..], b"]"].concat();
    let (status, answer) = node
        .post("/", "many", body.into())
        .await
        .expect("an answer");
    assert_eq!(status, 202, "{answer}");
    node.all_ended(600, PATIENCE).await;
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    let (status, printed, told) =
        waypost(&["dead", "drop", "--all", "--yes", "--admin", admin]).await;
    assert_eq!((status, &*printed), (Some(0), "600 dropped\n"), "{told}");
    let expected = "Plan: drop 600 of 600 on disk: all dead letters\n\
                    500 of 600 dropped\n600 of 600 dropped\n";
    assert_eq!(told, expected);
    assert!(node.dead().await.is_empty());
}

#[actix_rt::test]
async fn what_dies_after_the_plan_is_no_part_of_an_order_whatever_its_end() {
    // In the place of a node: at the time 7000 it knows of one letter.
    let node = Api::start();
    node.behave(|_, _| Conduct::AnswerWith {
        status: 200,
        headers: Vec::new(),
        body: br#"{"at_ms":7000,"matching":1,"total":2,"dropped":1}"#.to_vec(),
    });
    for (filter, until_ms) in [
        (&["--all"][..], 7000),
        (&["--reason", "422"], 7000),
        (&["--until", "2999-01-01T00:00:00Z"], 7000),
        (&["--until", "1970-01-01T00:00:06Z"], 6000),
    ] {
        let order = &["dead", "drop", "--yes", "--admin", &node.url()];
        let (status, printed, told) = waypost(&[&order[..], filter].concat()).await;
        assert_eq!((status, &*printed), (Some(0), "1 dropped\n"), "{told}");
        let posts = node.posts();
        let order = &posts.last().expect("an order").body;
        let order: Value = serde_json::from_slice(order).expect("JSON");
        assert_eq!(order["filter"]["until_ms"], until_ms, "{order}");
        assert_eq!(order["limit"], 1, "{order}");
    }
}
