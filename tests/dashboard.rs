//! The dashboard in `docker/`: a real Prometheus scrapes a real node, and no panel is empty.

use std::{fs, path::Path, process::Command, time::Duration};

use serde_json::Value;

use crate::{
    metrics::{SAMPLED, node_with_all_metrics, post_with_trace},
    support::{
        api::Api,
        eventually,
        node::Node,
        prometheus::{Prometheus, program},
        traffic,
    },
};

/// Each series needs some scrapes, and Prometheus a while to look for its targets.
const PATIENCE: Duration = Duration::from_mins(2);

/// Title and query of each target of each panel, as Grafana sends it.
fn queries() -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/grafana-dashboard.json");
    let text = fs::read_to_string(path).expect("the dashboard is there");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let queries = panels
        .iter()
        .filter(|panel| panel["type"] != "row")
        .flat_map(|panel| {
            let title = panel["title"].as_str().expect("a title");
            let targets = panel["targets"].as_array().expect("targets");
            assert!(!targets.is_empty(), "{title}");
            targets.iter().map(move |target| {
                let query = target["expr"].as_str().expect("a query");
                // Four times the interval of the scrapes, as Grafana's documentation says.
                let query = query.replace("$__rate_interval", "4s");
                (title.to_owned(), query.replace("$instance", ".*"))
            })
        });
    queries.collect()
}

/// Posts records until the test has seen enough.
async fn load(node: &Node) {
    for number in 0_u64.. {
        let key = number.to_string();
        node.post("/", &key, traffic()[0].clone()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn each_query_has_a_number(prometheus: &Prometheus) {
    let queries = queries();
    assert!(queries.len() > 30, "{queries:?}");
    for (title, query) in queries {
        assert!(
            !query.contains('$'),
            "{title}: an unknown variable: {query}"
        );
        eventually(&format!("{title}: {query}"), PATIENCE, async || {
            let numbers = prometheus.numbers(&query).await;
            (!numbers.is_empty()).then_some(())
        })
        .await;
    }
}

#[actix_rt::test]
async fn no_panel_is_empty_and_prometheus_takes_rules_and_exemplars() {
    let api = Api::start();
    let node = node_with_all_metrics(&api).await;
    let Some(prometheus) = Prometheus::start(node.admin).await else {
        return;
    };
    post_with_trace(&node, "traced", SAMPLED).await;
    tokio::select! {
        () = load(&node) => {}
        () = each_query_has_a_number(&prometheus) => {}
    }
    let rules = prometheus.get("rules", &[]).await;
    let rules = rules["groups"][0]["rules"]
        .as_array()
        .expect("rules")
        .clone();
    assert!(!rules.is_empty());
    for rule in &rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        assert_eq!(rule["state"], "inactive", "a healthy node: {rule}");
    }
    let exemplar = eventually("the exemplar is stored", PATIENCE, async || {
        let parameters = [
            ("query", "waypost_delivery_seconds_bucket"),
            ("start", "0"),
            ("end", "9999999999"),
        ];
        let found = prometheus.get("query_exemplars", &parameters).await;
        let exemplar = found[0]["exemplars"][0].clone();
        (!exemplar.is_null()).then_some(exemplar)
    })
    .await;
    assert_eq!(exemplar["labels"]["trace_id"], SAMPLED[3..35]);
}

#[actix_rt::test]
async fn promtool_has_nothing_against_the_metrics() {
    let Some(promtool) = program("promtool") else {
        return;
    };
    let api = Api::start();
    let node = node_with_all_metrics(&api).await;
    let (_, text) = node.text("/metrics").await;
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), &text).expect("room");
    let output = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(fs::File::open(file.path()).expect("it is there"))
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{output:?}");
}
