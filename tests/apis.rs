//! Several APIs behind the same lanes: each is chosen by a rule, and one that hangs or fails costs
//! the others nothing.

use std::{
    collections::HashSet,
    fs,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use awc::http::StatusCode;
use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::TempDir;
use waypost::{
    clock::unix_us,
    proto::{self, waypost_client::WaypostClient},
    record::{Origin, Record},
    spool::{Entry, Queue, Spool},
};

use crate::{
    ingest,
    support::{
        api::{Api, Conduct},
        eventually,
        lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
        node::{Node, PATIENCE},
        rig::Rig as _,
    },
};

/// Records of one request.
const REQUEST: usize = 100;
/// The records of one API that a lane has in hand at most, if there are two.
const SHARE: u64 = 1024 / 2;
/// More than any broker hands out at once.
const MANY: usize = 3000;
const WELL: &str = "well";
const SLOW: &str = "slow";
const POISON: &str = "poison";

/// `[api]` and `[apis.slow]`, and a rule between them.
struct TwoApis {
    well: Api,
    slow: Api,
    /// The slow one hangs.
    hangs: Arc<AtomicBool>,
    _folder: TempDir,
    file: PathBuf,
}

impl TwoApis {
    /// `settings` are keys of `[apis.slow]`.
    fn start(settings: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (well, slow) = (Api::start(), Api::start());
        let hangs = Arc::<AtomicBool>::default();
        let is_hanging = Arc::clone(&hangs);
        slow.behave(move |_, _| {
            if is_hanging.load(Relaxed) {
                Conduct::Hang
            } else {
                Conduct::Answer(200)
            }
        });
        let apis = Self {
            file: folder.path().join("waypost.toml"),
            well,
            slow,
            hangs,
            _folder: folder,
        };
        apis.configure(settings);
        apis
    }

    fn configure(&self, settings: &str) {
        let url = self.slow.url();
        self.write(&format!(
            "[ingest]\nschema = \"any\"\n[apis.slow]\nurl = \"{url}\"\n{settings}\n[[routes]]\n\
             when = {{ pointer = \"/state\", equals = \"slow\" }}\napi = \"slow\"\n"
        ));
    }

    fn write(&self, text: &str) {
        fs::write(&self.file, text).expect("the file is ours");
    }

    async fn node(&self, variables: &[(String, String)]) -> Node {
        Node::start_with_config(&self.well.url(), variables, &self.file).await
    }

    /// The ids that each has taken.
    fn taken(&self) -> [HashSet<String>; 2] {
        [&self.well, &self.slow].map(|api| {
            let keys = api.taken().into_keys();
            keys.flat_map(|key| key.split(',').map(str::to_owned).collect::<Vec<_>>())
                .collect()
        })
    }
}

fn with(variables: &[(String, String)], more: &[(&str, &str)]) -> Vec<(String, String)> {
    let more = more
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    variables.iter().cloned().chain(more).collect()
}

/// Posts so many records of this state. Returns their ids.
async fn post(node: &Node, name: &str, state: &str, count: usize) -> HashSet<String> {
    let mut ids = HashSet::new();
    for (number, from) in (0..count).step_by(REQUEST).enumerate() {
        let key = format!("{name}-{number}");
        let size = REQUEST.min(count - from);
        let records: Vec<_> = (0..size).map(|_| json!({"state": state})).collect();
        let body = Bytes::from(Value::from(records).to_string());
        let answer = node.post("/", &key, body).await.expect("an answer");
        assert_eq!(answer.0, StatusCode::ACCEPTED, "{answer:?}");
        ids.extend((0..size).map(|index| format!("{key}/{index}")));
    }
    ids
}

async fn of_api(node: &Node, name: &str) -> Value {
    node.status().await["apis"][name].clone()
}

/// The bodies of POSTs, of which each is an array if `batch` is over 1.
fn each_is_tagged(api: &Api, batch: &str, tag: &str) {
    for post in api.posts() {
        let body: Value = serde_json::from_slice(&post.body).expect("JSON");
        let records = match &body {
            Value::Array(records) if batch != "1" => records.clone(),
            Value::Object(_) if batch == "1" => vec![body],
            other => panic!("batch {batch}: {other}"),
        };
        assert!(
            records.iter().all(|record| record["path"] == tag),
            "{records:?}"
        );
    }
}

/// `variables` are of a stream, queue or subscription of its own for each node.
async fn an_api_that_hangs_holds_up_no_other(
    lane: &str,
    tag: &str,
    mut variables: impl FnMut() -> Vec<(String, String)>,
) {
    for batch in ["1", "20"] {
        let apis = TwoApis::start(&format!("timeout = \"2s\"\nbatch = {batch}"));
        apis.hangs.store(true, Relaxed);
        let node = apis
            .node(&with(&variables(), &[("API__BATCH", batch)]))
            .await;
        node.lane_is(lane, "up", PATIENCE).await;
        let slow = post(&node, "a", SLOW, MANY).await;
        let well = post(&node, "b", WELL, 500).await;
        eventually("those of the other API arrive", PATIENCE, async || {
            (apis.taken()[0].len() >= well.len()).then_some(())
        })
        .await;
        let status = node.status().await;
        assert_eq!(status["apis"]["default"]["held"], 0, "{status}");
        eventually("no broker waits for the other", PATIENCE, async || {
            let status = node.status().await;
            let held = status["apis"]["slow"]["held"].as_u64()?;
            (held == MANY as u64 && status["ledger"]["in_flight"] == 0).then_some(())
        })
        .await;
        assert!(
            node.log()
                .contains("does not take its records as fast as they come")
        );

        apis.hangs.store(false, Relaxed);
        let ledger = node.all_ended(MANY + 500, 2 * PATIENCE).await;
        assert_eq!(ledger["delivered"], MANY + 500, "{ledger}");
        assert_eq!(apis.taken(), [well, slow], "each to its own API");
        each_is_tagged(&apis.slow, batch, tag);
        each_is_tagged(&apis.well, batch, tag);
        eventually("the ledger balances", PATIENCE, async || {
            let status = node.status().await;
            let of_slow = &status["apis"]["slow"];
            (status["balanced"] == true && of_slow["held"] == 0 && of_slow["state"] == "up")
                .then_some(())
        })
        .await;
    }
}

#[actix_rt::test]
async fn an_api_that_hangs_holds_up_no_other_on_nats() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    an_api_that_hangs_holds_up_no_other("nats", "NATS", || nats.variables()).await;
}

#[actix_rt::test]
async fn an_api_that_hangs_holds_up_no_other_where_messages_are_bundles() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = || with(&nats.variables(), &[("LANES__NATS__BUNDLE", "16")]);
    an_api_that_hangs_holds_up_no_other("nats", "NATS", variables).await;
}

#[actix_rt::test]
async fn an_api_that_hangs_holds_up_no_other_on_rabbitmq() {
    let Some(mut rabbit) = Rabbitmq::start().await else {
        return;
    };
    an_api_that_hangs_holds_up_no_other("rabbitmq", "RabbitMQ", || rabbit.variables()).await;
}

#[actix_rt::test]
async fn an_api_that_hangs_holds_up_no_other_on_pubsub() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    an_api_that_hangs_holds_up_no_other("pubsub", "PubSub", || pubsub.variables()).await;
}

#[actix_rt::test]
async fn an_api_that_hangs_holds_up_no_other_on_grpc() {
    an_api_that_hangs_holds_up_no_other("grpc", "GRPC", grpc_variables).await;
}

#[actix_rt::test]
async fn a_record_that_its_slow_api_takes_is_posted_once_though_it_has_left_its_broker() {
    let Some(mut rabbit) = Rabbitmq::start().await else {
        return;
    };
    for batch in ["1", "20"] {
        let apis = TwoApis::start(&format!("batch = {batch}"));
        apis.slow.delay(Duration::from_secs(2));
        let mut node = apis.node(&rabbit.variables()).await;
        node.lane_is("rabbitmq", "up", PATIENCE).await;
        let slow = post(&node, "a", SLOW, 60).await;
        eventually("they have left the broker", PATIENCE, async || {
            let status = node.status().await;
            (status["apis"]["slow"]["held"] == 60 && status["ledger"]["in_flight"] == 0)
                .then_some(())
        })
        .await;
        let ledger = node.all_ended(60, PATIENCE).await;
        assert_eq!(ledger["delivered"], 60, "{ledger}");
        assert_eq!(apis.taken()[1], slow);
        eventually("nothing is left on disk", PATIENCE, async || {
            let status = node.status().await;
            (status["balanced"] == true && status["apis"]["slow"]["held"] == 0).then_some(())
        })
        .await;
        // A second POST would have begun by now, and the node waits for it.
        node.signal("TERM");
        assert!(node.ended(PATIENCE).await.success());
        assert!(apis.slow.taken().values().all(|count| *count == 1));
    }
}

#[actix_rt::test]
async fn a_slow_api_gets_all_of_its_records_and_a_kill_loses_none() {
    let apis = TwoApis::start("timeout = \"2s\"");
    apis.hangs.store(true, Relaxed);
    let mut node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let slow = post(&node, "a", SLOW, MANY).await;
    eventually("most are held", PATIENCE, async || {
        let held = of_api(&node, SLOW).await["held"].as_u64()?;
        (held >= MANY as u64 - SHARE).then_some(())
    })
    .await;
    node.killed_and_started().await;
    assert_ne!(of_api(&node, SLOW).await["held"], 0);
    apis.hangs.store(false, Relaxed);
    node.all_ended(MANY, PATIENCE).await;
    assert_eq!(apis.taken()[1], slow);
    eventually("the ledger balances", PATIENCE, async || {
        (node.status().await["balanced"] == true).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn an_api_that_is_removed_keeps_its_records_until_it_is_back() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let apis = TwoApis::start("timeout = \"2s\"");
    apis.hangs.store(true, Relaxed);
    let mut node = apis.node(&nats.variables()).await;
    // Some are to be in the broker when the node is killed.
    node.plant("messages-stay=return");
    node.killed_and_started().await;
    node.lane_is("nats", "up", PATIENCE).await;
    let slow = post(&node, "a", SLOW, MANY).await;
    eventually("most are held", PATIENCE, async || {
        let held = of_api(&node, SLOW).await["held"].as_u64()?;
        (held >= MANY as u64 - SHARE).then_some(())
    })
    .await;

    // The records in the broker come out for an API that is unknown.
    apis.write("[ingest]\nschema = \"any\"\n");
    node.killed_and_started().await;
    // The broker sends what the killed node had again after an ack wait of half a minute.
    eventually("all are unclaimed", 2 * PATIENCE, async || {
        let status = node.status().await;
        let count = |at: &Value| at.as_u64().expect("a count");
        let is_at_rest = count(&status["ledger"]["parked"]) == count(&status["unclaimed"]);
        (count(&status["unclaimed"]) >= MANY as u64 && is_at_rest).then_some(())
    })
    .await;
    let log = node.log();
    for line in [
        "for an API that is not configured any more",
        "a record is for an API that is not configured at this node",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
    let unclaimed = node.metric("waypost_unclaimed_records").await;
    assert!(unclaimed.parse::<usize>().unwrap() >= MANY, "{unclaimed}");
    // An order for one API finds those of that API alone.
    for (api, is_theirs) in [("default", false), (SLOW, true)] {
        let path = format!("/api/dead?parked=true&limit=1&api={api}");
        let (_, list) = node.get(&path).await.expect("an answer");
        for count in ["total", "matching"] {
            let all = list[count].as_u64().expect("a count") >= MANY as u64;
            assert_eq!(all, is_theirs, "{api}: {list}");
        }
    }
    let order = json!({"all": true, "parked": true, "api": "default"});
    let (_, dropped) = node.tell("/api/dead/drop", order).await;
    assert_eq!(dropped["dropped"], 0, "{dropped}");
    let well = post(&node, "b", WELL, 10).await;
    eventually("[api] gets its own", PATIENCE, async || {
        (apis.taken()[0] == well).then_some(())
    })
    .await;

    apis.hangs.store(false, Relaxed);
    apis.configure("");
    node.killed_and_started().await;
    eventually("it has all of its records", PATIENCE, async || {
        (apis.taken()[1] == slow).then_some(())
    })
    .await;
    eventually("the ledger balances", PATIENCE, async || {
        let status = node.status().await;
        (status["balanced"] == true && status["unclaimed"] == 0 && status["ledger"]["parked"] == 0)
            .then_some(())
    })
    .await;
    assert_eq!(apis.taken()[0], well, "none went to the other API");
}

#[actix_rt::test]
async fn each_api_has_dead_letters_and_parked_records_of_its_own() {
    for batch in ["1", "10"] {
        let apis = TwoApis::start(&format!("batch = {batch}"));
        let judge = |answer| {
            move |_, post: &crate::support::api::Post| {
                let is_bad = memchr::memmem::find(&post.body, POISON.as_bytes()).is_some();
                Conduct::Answer(if is_bad { answer } else { 200 })
            }
        };
        apis.well.behave(judge(422));
        apis.slow.behave(judge(500));
        let text = fs::read_to_string(&apis.file).unwrap();
        apis.write(&format!(
            "{text}[[routes]]\nwhen = {{ pointer = \"/state\", equals = \"poison-slow\" }}\n\
             api = \"slow\"\n"
        ));
        let node = apis
            .node(&with(&grpc_variables(), &[("API__BATCH", batch)]))
            .await;
        node.lane_is("grpc", "up", PATIENCE).await;
        post(&node, "dead", POISON, 3).await;
        let parked = post(&node, "parked", "poison-slow", 2).await;
        post(&node, "well", SLOW, 50).await;
        let counts = async || {
            let apis = node.status().await["apis"].clone();
            let of = |name: &str, what: &str| apis[name][what].as_u64().expect("a count");
            [
                of("default", "dead"),
                of("default", "parked"),
                of(SLOW, "dead"),
                of(SLOW, "parked"),
            ]
        };
        let probe = async || {
            // Others succeed, so the records are to blame.
            post(&node, &format!("more-{}", unix_us()), SLOW, 10).await;
            (counts().await == [3, 0, 0, 2]).then_some(())
        };
        eventually("each has its own", PATIENCE, probe).await;
        for (name, kind, total) in [
            ("default", "dead", 3),
            (SLOW, "dead", 0),
            ("default", "parked", 0),
            (SLOW, "parked", 2),
        ] {
            let is_parked = kind == "parked";
            let path = format!("/api/dead?api={name}&parked={is_parked}");
            let (_, list) = node.get(&path).await.expect("an answer");
            assert_eq!(list["total"], total, "{name} {kind}: {list}");
            let records = list[kind].as_array().expect("a list");
            assert!(records.iter().all(|record| record["api"] == name), "{list}");
        }
        let (status, _) = node.get("/api/dead?api=nobody").await.expect("an answer");
        assert_eq!(status, StatusCode::BAD_REQUEST);
        let admin = format!("http://127.0.0.1:{}", node.admin);
        let listed = tokio::task::spawn_blocking(move || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
            command.args(["dead", "list", "--api", SLOW, "--parked", "--admin", &admin]);
            String::from_utf8(command.output().expect("it runs").stdout).expect("text")
        });
        let listed = listed.await.unwrap();
        assert!(listed.contains("2 parked records"), "{listed}");
        for (name, value) in [
            ("waypost_each_api_dead_letters{api=\"default\"}", "3"),
            ("waypost_each_api_parked_records{api=\"slow\"}", "2"),
            ("waypost_each_api_up{api=\"slow\"}", "1"),
            ("waypost_each_api_held_records{api=\"slow\"}", "0"),
        ] {
            assert_eq!(node.metric(name).await, value, "{name}");
        }

        // A parked record goes as an array too, and a replayed dead letter to its own API.
        apis.slow.behave(|_, _| Conduct::Answer(200));
        apis.well.behave(|_, _| Conduct::Answer(200));
        eventually("the parked ones arrive", PATIENCE, async || {
            parked.is_subset(&apis.taken()[1]).then_some(())
        })
        .await;
        let order = json!({"all": true, "api": "default"});
        let (_, replayed) = node.tell("/api/dead/replay", order).await;
        assert_eq!(replayed["replayed"], 3, "{replayed}");
        eventually("the dead letters arrive", PATIENCE, async || {
            (apis.taken()[0].len() == 3).then_some(())
        })
        .await;
        each_is_tagged(&apis.slow, batch, "GRPC");
    }
}

#[actix_rt::test]
async fn a_dead_letter_of_an_api_is_replayed_to_that_api() {
    let apis = TwoApis::start("");
    apis.slow.behave(|_, _| Conduct::Answer(422));
    let node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let slow = post(&node, "a", SLOW, 5).await;
    eventually("all are dead", PATIENCE, async || {
        (of_api(&node, SLOW).await["dead"] == 5).then_some(())
    })
    .await;
    assert_eq!(node.dead().await, slow);
    apis.slow.behave(|_, _| Conduct::Answer(200));
    let (_, replayed) = node.tell("/api/dead/replay", json!({"all": true})).await;
    assert_eq!(replayed["replayed"], 5, "{replayed}");
    eventually("they arrive", PATIENCE, async || {
        (apis.taken() == [HashSet::new(), slow.clone()]).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn a_full_disk_of_one_api_refuses_its_records_and_no_others() {
    let apis = TwoApis::start("timeout = \"2s\"\nspool_max = \"1MiB\"");
    apis.hangs.store(true, Relaxed);
    let node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let large = |state: &str| {
        let record = json!({"state": state, "text": "x".repeat(10_000)});
        Bytes::from(record.to_string())
    };
    let mut number = 0;
    let refused = async || {
        number += 1;
        let key = format!("a-{number}");
        let (status, problem) = node.post("/", &key, large(SLOW)).await.expect("an answer");
        (status == StatusCode::SERVICE_UNAVAILABLE).then_some(problem)
    };
    let problem = eventually("it is refused", PATIENCE, refused).await;
    let detail = problem["detail"].as_str().expect("a detail");
    assert!(detail.contains("[apis.slow].spool_max"), "{detail}");
    eventually("nobody knows when there is room", PATIENCE, async || {
        let (_, headers, _) = ingest::post(large(SLOW)).send_and_see(&node).await;
        let pause = headers.get("retry-after")?.to_str().ok()?;
        (pause.parse::<u64>().ok()? > 1).then_some(())
    })
    .await;
    assert_eq!(of_api(&node, SLOW).await["refuses"], true);
    assert_eq!(
        node.metric("waypost_each_api_refuses{api=\"slow\"}").await,
        "1"
    );
    eventually("it is the node's own", PATIENCE, async || {
        let own = node.status().await["spool"]["bytes"].to_string();
        (node.metric("waypost_spool_bytes").await == own).then_some(())
    })
    .await;
    let (status, receipt) = node.post("/", "b", large(WELL)).await.expect("an answer");
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    eventually("the other gets its own", PATIENCE, async || {
        (apis.taken()[0].len() == 1).then_some(())
    })
    .await;
    apis.hangs.store(false, Relaxed);
    eventually("it takes records again", PATIENCE, async || {
        (of_api(&node, SLOW).await["refuses"] == false).then_some(())
    })
    .await;
    node.at_rest(PATIENCE).await;
}

/// A drain frees the places for which others wait.
#[actix_rt::test]
async fn a_lane_is_paused_in_time_though_an_api_is_away_and_its_disk_full() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let mut apis = TwoApis::start("concurrency = 16\nspool_max = \"1MiB\"");
    apis.slow.stop().await;
    let node = apis
        .node(&with(&nats.variables(), &[("INGEST__MAX_BODY", "8MiB")]))
        .await;
    node.lane_is("nats", "up", PATIENCE).await;
    let record = json!({"state": SLOW, "text": "x".repeat(5_000)});
    let batch = Value::from(vec![record; 400]).to_string();
    let (status, body) = node.post("/", "a", batch.into()).await.expect("an answer");
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    eventually("its disk is full", PATIENCE, async || {
        let of_api = of_api(&node, SLOW).await;
        (of_api["refuses"] == true && of_api["state"] == "down").then_some(())
    })
    .await;
    let in_flight = node.status().await["ledger"]["in_flight"].as_u64();
    assert!(in_flight > Some(16), "{in_flight:?}");
    for (order, state) in [("pause", "paused"), ("resume", "up")] {
        assert_eq!(node.order("nats", order).await, StatusCode::ACCEPTED);
        node.lane_is("nats", state, PATIENCE).await;
    }
    assert_eq!(node.lane("nats").await["last_error"], Value::Null);
    apis.slow.start_again();
    node.at_rest(PATIENCE).await;
    assert_eq!(apis.taken()[1].len(), 400);
}

#[actix_rt::test]
async fn an_entry_of_an_earlier_version_goes_to_the_first_api() {
    let apis = TwoApis::start("");
    let text = fs::read_to_string(&apis.file).unwrap();
    apis.write(&format!("{text}[[routes]]\napi = \"slow\"\n"));
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1 << 30).unwrap();
    let record = Record {
        id: "old".into(),
        body: Bytes::from_static(b"{\"state\":\"x\"}"),
        trace: None,
        origin: Some(Origin::now("earlier".into())),
        api: None,
        event: None,
    };
    // Without an API it has the fields of an earlier version.
    spool
        .put(Queue::Waiting, &Entry::new(&record, None))
        .await
        .unwrap();
    spool.close().await;
    drop(spool);
    let data = folder.path().to_str().unwrap();
    let node = apis
        .node(&with(&grpc_variables(), &[("SPOOL__DIR", data)]))
        .await;
    let new = post(&node, "new", "x", 1).await;
    eventually("each arrives", PATIENCE, async || {
        let [well, slow] = apis.taken();
        (well.contains("old") && slow == new).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn a_record_of_another_client_goes_to_the_api_that_it_names() {
    let apis = TwoApis::start("");
    let port = crate::support::process::free_port();
    let variables = [(
        "LANES__GRPC__LISTEN".to_owned(),
        format!("127.0.0.1:{port}"),
    )];
    let node = apis.node(&variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut client = WaypostClient::connect(format!("http://127.0.0.1:{port}"))
        .await
        .expect("the node listens");
    for (id, api) in [("none", ""), ("known", SLOW), ("unknown", "nobody")] {
        let record = proto::Record {
            id: id.into(),
            body: Bytes::from_static(b"{}"),
            api: api.into(),
            ..proto::Record::default()
        };
        let receipt = client.send(record).await.expect("a receipt").into_inner();
        assert_eq!(receipt.outcome(), proto::Outcome::Safe, "{receipt:?}");
    }
    eventually("two arrive, one waits", PATIENCE, async || {
        let is_there = apis.taken()
            == [
                HashSet::from(["none".into()]),
                HashSet::from(["known".into()]),
            ];
        (is_there && node.status().await["unclaimed"] == 1).then_some(())
    })
    .await;
    // Nobody reaches it by the name of another API.
    let dropped = async |api: &str| {
        let order = json!({"ids": ["unknown"], "parked": true, "api": api});
        node.tell("/api/dead/drop", order).await.1["dropped"].clone()
    };
    assert_eq!(dropped(SLOW).await, 0);
    for (api, expected) in [
        ("nobody", StatusCode::OK),
        ("typo", StatusCode::BAD_REQUEST),
    ] {
        let path = format!("/api/dead?parked=true&api={api}");
        let (status, list) = node.get(&path).await.expect("an answer");
        assert_eq!(status, expected, "{api}: {list}");
    }
    assert_eq!(dropped("typo").await, Value::Null);
    assert_eq!(dropped("nobody").await, 1);
}

#[actix_rt::test]
async fn a_reload_changes_the_api_of_a_rule_and_names_what_needs_a_restart() {
    let apis = TwoApis::start("");
    let node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let text = fs::read_to_string(&apis.file).unwrap();
    let reload = async |text: &str| {
        apis.write(text);
        node.tell("/api/reload", json!({})).await.1
    };
    let report = reload(&format!("{text}[[routes]]\napi = \"slow\"\n")).await;
    assert_eq!(report["applied"], json!(["routes"]), "{report}");
    let moved = post(&node, "a", WELL, 1).await;
    eventually("it goes to the other", PATIENCE, async || {
        (apis.taken()[1] == moved).then_some(())
    })
    .await;
    let (_, told) = node.get("/api/explain?id=a-0/0").await.expect("an answer");
    assert_eq!(told["choices"][0]["api"], "apis.slow", "{told}");

    let more = "[apis.more]\nurl = \"http://127.0.0.1:9/\"\n";
    let slower = text.replace("[[routes]]", &format!("timeout = \"3s\"\n{more}[[routes]]"));
    let report = reload(&slower).await;
    let needs_restart = json!(["apis.more", "apis.slow.timeout"]);
    assert_eq!(report["needs_restart"], needs_restart, "{report}");
    let report = reload(&text.replace("api = \"slow\"", "api = \"nobody\"")).await;
    assert_eq!(report["reasons"][0]["key"], "routes[1].api", "{report}");
}

#[actix_rt::test]
async fn a_pause_of_the_lane_and_a_drain_of_the_node_leave_held_records_safe() {
    let apis = TwoApis::start("timeout = \"2s\"");
    apis.hangs.store(true, Relaxed);
    let mut node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let slow = post(&node, "a", SLOW, 1000).await;
    eventually("some are held", PATIENCE, async || {
        (of_api(&node, SLOW).await["held"].as_u64()? > 0).then_some(())
    })
    .await;
    for order in ["pause", "resume"] {
        assert_eq!(node.order("grpc", order).await, StatusCode::ACCEPTED);
    }
    node.lane_is("grpc", "up", PATIENCE).await;
    node.signal("TERM");
    assert!(node.ended(Duration::from_secs(10)).await.success());
    apis.hangs.store(false, Relaxed);
    node.start_again().await;
    eventually("all arrive", PATIENCE, async || {
        (apis.taken()[1] == slow).then_some(())
    })
    .await;
    eventually("the ledger balances", PATIENCE, async || {
        let status = node.status().await;
        (status["balanced"] == true && status["ledger"]["parked"] == 0).then_some(())
    })
    .await;
}

/// After a restart that has changed the tag of their lane, the API fails at held records while it
/// takes others.
#[actix_rt::test]
async fn a_held_record_that_is_parked_keeps_the_path_that_it_took() {
    for batch in ["1", "10"] {
        let apis = TwoApis::start("");
        let configure = |tag: &str| {
            apis.configure(&format!("timeout = \"2s\"\nbatch = {batch}"));
            let text = fs::read_to_string(&apis.file).unwrap();
            apis.write(&format!("{text}[lanes.grpc]\ntag = \"{tag}\"\n"));
        };
        configure("OLD");
        apis.hangs.store(true, Relaxed);
        let mut node = apis.node(&grpc_variables()).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        post(&node, "old", SLOW, 600).await;
        eventually("all are held", PATIENCE, async || {
            let status = node.status().await;
            (status["apis"][SLOW]["held"] == 600 && status["ledger"]["in_flight"] == 0)
                .then_some(())
        })
        .await;

        configure("NEW");
        let is_old = |key: &str| key.starts_with("old-0/1");
        apis.slow.behave(move |_, post| {
            let fails = post
                .key
                .as_deref()
                .is_some_and(|keys| keys.split(',').any(is_old));
            Conduct::Answer(if fails { 500 } else { 200 })
        });
        node.killed_and_started().await;
        eventually("some are parked", PATIENCE, async || {
            let of_slow = of_api(&node, SLOW).await;
            (of_slow["held"] == 0 && of_slow["parked"].as_u64()? > 0).then_some(())
        })
        .await;
        apis.slow.behave(|_, _| Conduct::Answer(200));
        let ledger = node.all_ended(600, PATIENCE).await;
        assert_eq!(ledger["delivered"], 600, "{ledger}");
        each_is_tagged(&apis.slow, batch, "OLD");
    }
}

/// An operator drops a held record during its POST, and then the API fails at it.
#[actix_rt::test]
async fn a_held_record_that_is_dropped_during_its_post_does_not_come_back() {
    let apis = TwoApis::start("timeout = \"2s\"");
    apis.hangs.store(true, Relaxed);
    let mut node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post(&node, "a", SLOW, 600).await;
    eventually("all are held", PATIENCE, async || {
        let status = node.status().await;
        (status["apis"][SLOW]["held"] == 600 && status["ledger"]["in_flight"] == 0).then_some(())
    })
    .await;
    apis.slow.behave(|_, post| {
        if post.key.as_deref() == Some("a-0/0") {
            Conduct::Hang
        } else {
            Conduct::Answer(200)
        }
    });
    node.killed_and_started().await;
    eventually("only one is left", PATIENCE, async || {
        (of_api(&node, SLOW).await["held"] == 1).then_some(())
    })
    .await;
    let order = json!({"ids": ["a-0/0"], "parked": true});
    let (_, dropped) = node.tell("/api/dead/drop", order).await;
    assert_eq!(dropped["dropped"], 1, "{dropped}");
    eventually("the API fails at it thrice", PATIENCE, async || {
        // Others succeed, so the record is to blame.
        post(&node, &format!("more-{}", unix_us()), SLOW, 1).await;
        node.log().contains("it is parked").then_some(())
    })
    .await;
    eventually("it is not parked any more", PATIENCE, async || {
        let ledger = &node.status().await["ledger"];
        ([&ledger["parked"], &ledger["dropped"]] == [&json!(0), &json!(1)]).then_some(())
    })
    .await;
}

#[test]
fn check_names_each_mistake_in_the_apis_and_explains_the_choice_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("waypost.toml");
    let record = folder.path().join("record.json");
    fs::write(&record, "{\"a\":1}").unwrap();
    let check = |text: &str, variables: &[(&str, &str)]| {
        fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
        command.arg("check").arg("--config").arg(&file);
        command.arg("--explain").arg(&record);
        command.envs(variables.iter().copied());
        command.output().expect("it runs")
    };
    let wrong = "[ingest]\nschema = \"any\"\n[apis.default]\nurl = \"http://a/\"\n[apis.Big]\n\
                 [apis.one]\n[apis.two]\nurl = \"ftp://a/\"\nfast = true\n\
                 [[routes]]\napi = \"three\"\n";
    let output = check(wrong, &[("WAYPOST_APIS__FOUR__TIMEOUT", "1s")]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    for line in [
        "waypost.toml:3: apis.default: is the name of [api]",
        "waypost.toml:5: apis.Big: is no name of an API",
        "waypost.toml:6: apis.one.url: is missing",
        "waypost.toml:8: apis.two.url: is not a URL that can be posted to",
        "waypost.toml:9: apis.two.fast: there is no such key",
        "waypost.toml:11: routes[1].api: \"three\" is no API; allowed are default, four, one, two",
        "WAYPOST_APIS__FOUR__TIMEOUT: apis.four.url: is missing",
    ] {
        assert!(told.contains(line), "{line}\n{told}");
    }
    let right = "[ingest]\nschema = \"any\"\n[[routes]]\napi = \"four\"\n";
    let output = check(right, &[("WAYPOST_APIS__FOUR__URL", "http://a/")]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("API        [apis.four]"), "{told}");
}
