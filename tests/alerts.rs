//! The alert rules in `docker/`: promtool tests each of them, and each leads to what the docs say
//! about it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde::Deserialize;

use crate::{metrics::documented, support::prometheus::program};

#[derive(Deserialize)]
struct RuleFile {
    groups: Vec<RuleGroup>,
}

#[derive(Deserialize)]
struct RuleGroup {
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    alert: String,
    expr: String,
    #[serde(rename = "for", default)]
    _for: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct TestFile {
    tests: Vec<RuleTest>,
}

#[derive(Deserialize)]
struct RuleTest {
    alert_rule_test: Vec<AlertTest>,
}

#[derive(Deserialize)]
struct AlertTest {
    alertname: String,
    exp_alerts: Vec<serde_json::Value>,
}

fn text(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|why| panic!("{}: {why}", path.display()))
}

fn rules() -> Vec<Rule> {
    let file: RuleFile = serde_saphyr::from_str(&text("docker/alerts.yaml")).expect("YAML");
    let groups = file.groups.into_iter();
    groups.flat_map(|group| group.rules).collect()
}

/// The names of our metrics and of the process in a query.
fn metrics_in(query: &str) -> BTreeSet<String> {
    let words = query.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    let names = words.filter(|word| word.starts_with("waypost_") || word.starts_with("process_"));
    names
        .map(|name| name.trim_end_matches("_bucket").to_owned())
        .collect()
}

#[test]
fn promtool_finds_that_each_alert_fires_and_stays_silent_as_it_should() {
    let Some(promtool) = program("promtool") else {
        return;
    };
    for arguments in [
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ] {
        let output = Command::new(&promtool)
            .args(arguments)
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docker"))
            .output()
            .expect("it runs");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() {
    let file: TestFile = serde_saphyr::from_str(&text("docker/alerts.test.yaml")).expect("YAML");
    let cases = file.tests.iter().flat_map(|test| &test.alert_rule_test);
    let cases: BTreeSet<_> = cases
        .map(|case| (case.alertname.clone(), !case.exp_alerts.is_empty()))
        .collect();
    let alerts = rules().into_iter().map(|rule| rule.alert);
    let expected = alerts.flat_map(|alert| [(alert.clone(), true), (alert, false)]);
    assert_eq!(cases, expected.collect());
}

#[test]
fn each_alert_tells_what_it_means_and_is_about_metrics_that_a_node_serves() {
    let known = documented();
    let docs = text("docs/operate.md");
    let headings = docs.lines().filter_map(|line| line.strip_prefix("### "));
    let headings: BTreeSet<_> = headings.map(str::to_lowercase).collect();
    for rule in rules() {
        let alert = &rule.alert;
        let severity = rule.labels.get("severity").map(String::as_str);
        assert!(matches!(severity, Some("critical" | "warning")), "{alert}");
        assert!(rule.annotations.contains_key("summary"), "{alert}");
        let runbook = rule.annotations.get("runbook").map(String::as_str);
        let heading = runbook.and_then(|runbook| runbook.strip_prefix("docs/operate.md#"));
        let heading = heading.unwrap_or_else(|| panic!("{alert}: {runbook:?}"));
        assert!(headings.contains(heading), "{alert}: no heading {heading}");
        let unknown: Vec<_> = metrics_in(&rule.expr).difference(&known).cloned().collect();
        assert_eq!(unknown, [""; 0], "{alert}");
    }
}
