//! Traces: the spans that a collector gets of a record, by names and attributes of the conventions, and
//! a collector that does not take them.

mod disk;

use std::{collections::BTreeSet, time::Duration};

use awc::http::StatusCode;
use bytes::Bytes;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use rustls::version::TLS13;
use serde_json::Value;

use crate::{
    support::{
        api::{Api, Conduct},
        collector::{Collector, SeenSpan, texts},
        eventually,
        lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
        node::{Node, PATIENCE},
        rig::Rig as _,
        tls::Authority,
        traffic,
    },
    tls::{self, Files},
};

/// A client's trace and span.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";
/// `tracestate` of the client, which comes as two lines.
const STATES: [&str; 2] = ["rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE", "azul=1"];
const STATE: &str = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,azul=1";
/// For a broker that has to be started, beside others.
const LANE_PATIENCE: Duration = Duration::from_mins(1);

/// `traceparent` of the client, whose trace is recorded or not.
fn client_context(is_sampled: bool) -> String {
    format!("00-{TRACE}-{SPAN}-0{}", u8::from(is_sampled))
}

async fn post(node: &Node, path: &str, traceparent: Option<&str>, body: Bytes) -> StatusCode {
    let url = format!("http://127.0.0.1:{}{path}", node.ingest);
    let mut request = awc::Client::default()
        .post(url)
        .content_type("application/json");
    if let Some(text) = traceparent {
        request = request.insert_header(("traceparent", text));
        for line in STATES {
            request = request.append_header(("tracestate", line));
        }
    }
    request.send_body(body).await.expect("an answer").status()
}

/// Three records as one request.
fn three() -> Bytes {
    let records = &traffic()[..3];
    let texts = records.iter().map(|record| String::from_utf8_lossy(record));
    format!("[{}]", texts.collect::<Vec<_>>().join(",")).into()
}

/// Each attribute has a name of the conventions.
fn are_conventional<'n>(names: impl Iterator<Item = &'n String>) {
    let list = include_str!("trace/attributes-1.44.txt");
    let known: BTreeSet<_> = list.lines().filter(|line| !line.starts_with('#')).collect();
    for name in names {
        assert!(known.contains(&**name), "{name} is no attribute's name");
    }
}

fn only(spans: &[SeenSpan], is_it: impl Fn(&SeenSpan) -> bool) -> &SeenSpan {
    let found: Vec<_> = spans.iter().filter(|span| is_it(span)).collect();
    assert_eq!(found.len(), 1, "{found:#?} of {spans:#?}");
    found[0]
}

fn operation<'s>(spans: &'s [SeenSpan], operation: &str) -> &'s SeenSpan {
    only(spans, |span| {
        span.attribute("messaging.operation.type") == operation
    })
}

/// The seven spans of a record that takes `lane`, whose destination is named `name`.
async fn is_one_chain(lane: &str, system: &str, name: &str, variables: &[(String, String)]) {
    let (api, collector) = (Api::start(), Collector::start());
    let variables = [variables, &collector.variables()].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is(lane, "up", LANE_PATIENCE).await;
    let client = client_context(true);
    let status = post(
        &node,
        &format!("/{lane}"),
        Some(&client),
        traffic()[0].clone(),
    )
    .await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let spans = collector
        .spans_when(7, |span| span.trace == TRACE, PATIENCE)
        .await;
    assert_eq!(spans.len(), 7, "{spans:#?}");
    are_conventional(spans.iter().flat_map(|span| span.attributes.keys()));
    assert!(spans.iter().all(|span| !span.is_error), "{spans:#?}");

    let request = only(&spans, |span| !span.attribute("http.route").is_empty());
    assert_eq!(request.parent, SPAN);
    assert_eq!(request.name, "POST /{lane}");
    assert_eq!(request.kind, SpanKind::Server);
    assert_eq!(request.attribute("url.path"), format!("/{lane}"));
    assert_eq!(request.attribute("http.response.status_code"), "202");

    let create = operation(&spans, "create");
    assert_eq!(
        (&create.parent, create.kind),
        (&request.id, SpanKind::Producer)
    );
    let process = operation(&spans, "process");
    assert_eq!(
        (&process.parent, process.kind),
        (&create.id, SpanKind::Consumer)
    );
    let settle = operation(&spans, "settle");
    assert_eq!(
        (&settle.parent, settle.kind),
        (&process.id, SpanKind::Client)
    );
    assert_eq!(settle.attribute("messaging.operation.name"), "ack");
    for span in [create, process, settle] {
        assert_eq!(span.attribute("messaging.system"), system);
        let operation = span.attribute("messaging.operation.name");
        assert_eq!(span.name, format!("{operation} {name}"));
    }

    let (send, receive) = if lane == "grpc" {
        let call = |kind| {
            only(&spans, move |span| {
                span.kind == kind && span.attribute("rpc.system.name") == "grpc"
            })
        };
        let calls = (call(SpanKind::Client), call(SpanKind::Server));
        for call in [calls.0, calls.1] {
            assert_eq!(call.name, "waypost.v1.Waypost/Carry");
            assert_eq!(call.attribute("rpc.response.status_code"), "OK");
        }
        calls
    } else {
        let sides = (operation(&spans, "send"), operation(&spans, "receive"));
        assert_eq!(sides.0.name, format!("send {name}"));
        assert_eq!(sides.1.name, format!("receive {name}"));
        for side in [sides.0, sides.1] {
            assert_eq!(side.kind, SpanKind::Client);
            assert_eq!(side.attribute("messaging.system"), system);
        }
        sides
    };
    for side in [send, receive] {
        assert_eq!(side.parent, create.id);
        assert_eq!(side.attribute("server.address"), "127.0.0.1");
    }

    let to_api = only(&spans, |span| !span.attribute("url.full").is_empty());
    assert_eq!(
        (&to_api.parent, to_api.kind),
        (&process.id, SpanKind::Client)
    );
    assert_eq!(to_api.name, "POST");
    assert_eq!(to_api.attribute("url.full"), api.url());
    assert_eq!(to_api.attribute("http.response.status_code"), "200");
    let context = format!("00-{TRACE}-{}-01", to_api.id);
    assert_eq!(api.posts()[0].traceparent, Some(context));
    assert_eq!(api.posts()[0].tracestate.as_deref(), Some(STATE));
    assert!(spans.iter().all(|span| span.state == STATE), "{spans:#?}");
}

#[actix_rt::test]
async fn a_record_on_the_grpc_lane_is_one_chain_of_spans() {
    is_one_chain("grpc", "waypost", "grpc", &grpc_variables()).await;
}

#[actix_rt::test]
async fn a_record_on_the_nats_lane_is_one_chain_of_spans() {
    if let Some(mut nats) = Nats::start().await {
        let variables = nats.variables();
        let subject = value_of(&variables, "LANES__NATS__SUBJECT");
        is_one_chain("nats", "nats", &subject, &variables).await;
    }
}

#[actix_rt::test]
async fn a_record_on_the_rabbitmq_lane_is_one_chain_of_spans() {
    if let Some(mut rabbitmq) = Rabbitmq::start().await {
        let variables = rabbitmq.variables();
        let queue = value_of(&variables, "LANES__RABBITMQ__QUEUE");
        is_one_chain("rabbitmq", "rabbitmq", &queue, &variables).await;
    }
}

#[actix_rt::test]
async fn a_record_on_the_pubsub_lane_is_one_chain_of_spans() {
    if let Some(mut pubsub) = Pubsub::start().await {
        let variables = pubsub.variables();
        let topic = value_of(&variables, "LANES__PUBSUB__TOPIC");
        is_one_chain("pubsub", "gcp_pubsub", &topic, &variables).await;
    }
}

fn value_of(variables: &[(String, String)], name: &str) -> String {
    let found = variables.iter().find(|(known, _)| known == name);
    found.expect("it is set").1.clone()
}

/// The spans of several records have no parent, and a link to each.
#[actix_rt::test]
async fn a_bundle_and_a_batch_are_linked_to_their_records() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (api, collector) = (Api::start(), Collector::start());
    let mut variables = [nats.variables(), collector.variables()].concat();
    for (name, value) in [("LANES__NATS__BUNDLE", "16"), ("API__BATCH", "16")] {
        variables.push((name.into(), value.into()));
    }
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let client = client_context(true);
    assert_eq!(
        post(&node, "/", Some(&client), three()).await,
        StatusCode::ACCEPTED
    );
    // The records may be delivered before their request and the publish have heard that.
    let is_last = |span: &SeenSpan| {
        let kind = span.attribute("messaging.operation.type");
        ["create", "send", "settle"].contains(&kind)
    };
    let spans = collector.spans_when(3 + 1 + 3, is_last, PATIENCE).await;
    are_conventional(spans.iter().flat_map(|span| span.attributes.keys()));

    let of_type = |kind: &str| -> Vec<_> {
        let kind = kind.to_owned();
        let found = spans.iter();
        found
            .filter(|span| span.attribute("messaging.operation.type") == kind)
            .collect()
    };
    let contexts = |spans: &[&SeenSpan]| -> BTreeSet<_> {
        let spans = spans.iter();
        spans
            .map(|span| (span.trace.clone(), span.id.clone()))
            .collect()
    };
    let creates = contexts(&of_type("create"));
    assert_eq!(creates.len(), 3, "{spans:#?}");
    for kind in ["send", "receive"] {
        let bundle = of_type(kind);
        assert_eq!(bundle.len(), 1, "{spans:#?}");
        let bundle = bundle[0];
        assert_eq!(bundle.attribute("messaging.batch.message_count"), "3");
        assert_eq!(
            bundle.links.iter().cloned().collect::<BTreeSet<_>>(),
            creates
        );
        assert!(
            bundle.parent.is_empty() && bundle.trace != TRACE,
            "{bundle:#?}"
        );
    }
    let processes = contexts(&of_type("process"));
    assert_eq!(processes.len(), 3, "{spans:#?}");
    let posts = spans.iter();
    let posts: Vec<_> = posts
        .filter(|span| !span.attribute("url.full").is_empty())
        .collect();
    // A record may have come too late for the batch: then it is the only one of its POST.
    let links = posts.iter().flat_map(|post| post.links.iter().cloned());
    let parents = posts.iter().filter(|post| post.links.is_empty());
    let parents = parents.map(|post| (TRACE.to_owned(), post.parent.clone()));
    assert_eq!(links.chain(parents).collect::<BTreeSet<_>>(), processes);
    for (posted, to_api) in api.posts().iter().zip(&posts) {
        let context = format!("00-{}-{}-01", to_api.trace, to_api.id);
        assert_eq!(posted.traceparent, Some(context));
        // A trace of several records is another one.
        let is_several = !to_api.links.is_empty();
        assert_eq!(posted.tracestate.is_none(), is_several, "{to_api:#?}");
    }
}

/// A POST that fails and is made again is a span each, and so is a record that the API refuses.
#[actix_rt::test]
async fn a_retry_and_a_dead_letter_are_told() {
    let (api, collector) = (Api::start(), Collector::start());
    api.behave(|number, _| Conduct::Answer([503, 400][number.min(1)]));
    let variables = [grpc_variables(), collector.variables()].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let status = post(&node, "/", None, traffic()[0].clone()).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let spans = collector.spans_when(8, |_| true, PATIENCE).await;
    are_conventional(spans.iter().flat_map(|span| span.attributes.keys()));
    let request = only(&spans, |span| span.parent.is_empty());
    assert_eq!(request.name, "POST /");
    assert!(
        spans.iter().all(|span| span.trace == request.trace),
        "{spans:#?}"
    );
    for (status, resends) in [("503", ""), ("400", "1")] {
        let to_api = only(&spans, |span| {
            !span.attribute("url.full").is_empty()
                && span.attribute("http.response.status_code") == status
        });
        assert_eq!(to_api.attribute("error.type"), status);
        assert_eq!(to_api.attribute("http.request.resend_count"), resends);
    }
    let settle = operation(&spans, "settle");
    assert_eq!(settle.attribute("messaging.operation.name"), "reject");
    let process = operation(&spans, "process");
    assert_eq!(process.attribute("error.type"), "dead_letter");
}

/// The traces of a node by the status.
async fn traces(node: &Node) -> Value {
    node.status().await["traces"].clone()
}

#[actix_rt::test]
async fn a_collector_that_hangs_costs_spans_and_no_record() {
    let (api, collector) = (Api::start(), Collector::start());
    collector.0.behave(|_, _| Conduct::Hang);
    let mut variables = [grpc_variables(), collector.variables()].concat();
    for (name, value) in [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "10"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "500"),
    ] {
        variables.push((name.into(), value.into()));
    }
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for record in &traffic()[..20] {
        let status = post(&node, "/", None, record.clone()).await;
        assert_eq!(status, StatusCode::ACCEPTED);
    }
    assert_eq!(node.at_rest(PATIENCE).await["delivered"], 20);
    eventually(
        "spans find no room, and others are given up",
        PATIENCE,
        async || {
            let lost = |why| node.metric(why);
            let full = lost(r#"waypost_trace_spans_lost_total{reason="queue_full"}"#).await;
            let gone = lost(r#"waypost_trace_spans_lost_total{reason="not_exported"}"#).await;
            (full != "0" && gone != "0").then_some(())
        },
    )
    .await;
    assert_eq!(node.metric("waypost_trace_spans_exported_total").await, "0");
    let status = traces(&node).await;
    assert_eq!(status["last_error"], "no answer within 300ms", "{status}");

    collector.0.behave(|_, _| Conduct::Answer(200));
    eventually("it takes spans again", PATIENCE, async || {
        let status = traces(&node).await;
        let is_well = status["last_error"].is_null() && status["exported"].as_u64() > Some(0);
        if is_well && node.log().contains("the collector takes spans again") {
            return Some(());
        }
        // So few that all find room.
        post(&node, "/", None, traffic()[0].clone()).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        None
    })
    .await;
    let log = node.log();
    assert_eq!(log.matches("spans of traces are lost").count(), 1, "{log}");
}

/// The variables that the program reads, beside what the table of `trace::settings` tests.
#[actix_rt::test]
async fn the_variables_of_opentelemetry_reach_the_collector() {
    let (api, collector) = (Api::start(), Collector::start());
    let mut variables = [grpc_variables(), collector.variables()].concat();
    for (name, value) in [
        ("OTEL_SERVICE_NAME", "router"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=ward%201"),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20secret",
        ),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_TRACES_SAMPLER", "nonsense"),
        // Over the queue: the spans that the node has when it stops are told too.
        ("OTEL_BSP_SCHEDULE_DELAY", "60000"),
    ] {
        variables.push((name.into(), value.into()));
    }
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post(&node, "/", None, traffic()[0].clone()).await;
    node.at_rest(PATIENCE).await;
    let told = node.log();
    assert!(told.contains("OTEL_TRACES_SAMPLER"), "{told}");
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
    let log = node.log();
    assert!(!log.contains("secret"), "{log}");
    let posts = collector.0.posts();
    assert_eq!(posts[0].authorization.as_deref(), Some("Bearer secret"));
    assert_eq!(posts[0].encoding.as_deref(), Some("gzip"));
    let requests = collector.requests();
    let resource = requests[0].resource_spans[0].resource.as_ref().unwrap();
    let resource = texts(&resource.attributes);
    are_conventional(resource.keys());
    assert_eq!(resource["service.name"], "router");
    assert_eq!(resource["service.namespace"], "ward 1");
    assert!(!resource["service.instance.id"].is_empty());
    assert_eq!(collector.spans().len(), 7);
}

/// Posts a record with a trace that the client records, and returns the context that the API gets.
async fn context_at_the_api(
    collector: &Collector,
    more: &[(&str, &str)],
) -> (Node, Option<String>) {
    let (node, [parent, state]) = headers_at_the_api(collector, more).await;
    assert_eq!(state.as_deref(), Some(STATE));
    (node, parent)
}

/// `traceparent` and `tracestate` at the API.
async fn headers_at_the_api(
    collector: &Collector,
    more: &[(&str, &str)],
) -> (Node, [Option<String>; 2]) {
    let api = Api::start();
    let mut variables = [grpc_variables(), collector.variables()].concat();
    let more = more.iter();
    variables.extend(more.map(|(name, value)| ((*name).into(), (*value).into())));
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post(
        &node,
        "/",
        Some(&client_context(true)),
        traffic()[0].clone(),
    )
    .await;
    api.wait_for(1, PATIENCE).await;
    let posted = api.posts().remove(0);
    (node, [posted.traceparent, posted.tracestate])
}

/// A request over TLS is told as that.
#[actix_rt::test]
async fn a_request_has_the_scheme_that_the_node_speaks() {
    let Some(authority) = Authority::new() else {
        return;
    };
    let (api, collector, files) = (Api::start(), Collector::start(), Files::new(&authority));
    for (scheme, tls) in [("http", Vec::new()), ("https", files.variables("INGEST"))] {
        let variables = [grpc_variables(), tls, collector.variables()].concat();
        let node = Node::start(&api.url(), &variables).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        let client = tls::client(tls::client_tls(&authority, None, &[&TLS13], &[]));
        let status = tls::post(&client, scheme, &node).await;
        assert_eq!(status, Some(StatusCode::ACCEPTED));
        let is_it = |span: &SeenSpan| span.attribute("url.scheme") == scheme;
        collector.spans_when(1, is_it, PATIENCE).await;
    }
}

#[actix_rt::test]
async fn a_trace_that_is_not_recorded_goes_on_as_such() {
    let collector = Collector::start();
    let off = [("OTEL_SDK_DISABLED", "true")];
    let (node, context) = context_at_the_api(&collector, &off).await;
    assert_eq!(traces(&node).await, Value::Null);
    assert_eq!(context, Some(client_context(true)));

    let none = [("OTEL_TRACES_SAMPLER", "always_off")];
    let (node, context) = context_at_the_api(&collector, &none).await;
    assert_eq!(traces(&node).await["sampler"], "always_off");
    // The receiver must not wait for a parent that nobody tells of.
    let context = context.expect("a context");
    assert!(context.starts_with(&format!("00-{TRACE}-")), "{context}");
    assert!(
        context.ends_with("-00") && !context.contains(SPAN),
        "{context}"
    );
    assert_eq!(collector.0.count(), 0);
}
