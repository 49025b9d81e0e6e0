//! A real Prometheus as a child process, and its checker of rules.

use std::{
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use url::Url;

use super::{
    eventually, missing,
    process::{free_port, start},
};

const PATIENCE: Duration = Duration::from_mins(1);

/// A program of the package; a missing one is a failure in CI.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/prometheus/usr/bin");
    let path = path.join(name);
    if path.is_file() {
        return Some(path);
    }
    missing("Prometheus");
    None
}

/// A running server; dropping it stops it.
pub struct Prometheus {
    child: Child,
    port: u16,
    http: awc::Client,
    _folder: TempDir,
}

impl Prometheus {
    /// Scrapes the admin side at `admin` once a second, as the job of the compose files, and
    /// evaluates their alerts.
    pub async fn start(admin: u16) -> Option<Self> {
        let program = program("prometheus")?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = folder.path().join("prometheus.yaml");
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{}/docker/alerts.yaml']\n\
             scrape_configs:\n  - job_name: waypost\n    static_configs:\n\
             \x20     - targets: ['127.0.0.1:{admin}']\n",
            env!("CARGO_MANIFEST_DIR")
        );
        std::fs::write(&config, text).expect("room");
        let port = free_port();
        let child = start(program.to_str().expect("a plain path"), |command| {
            command
                .arg(format!("--config.file={}", config.display()))
                .arg(format!("--storage.tsdb.path={}", folder.path().display()))
                .arg(format!("--web.listen-address=127.0.0.1:{port}"))
                .arg("--enable-feature=exemplar-storage")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        });
        let server = Self {
            child: child.expect("the program starts"),
            port,
            http: awc::Client::default(),
            _folder: folder,
        };
        eventually("Prometheus is ready", PATIENCE, async || {
            let url = format!("http://127.0.0.1:{port}/-/ready");
            let answer = server.http.get(url).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        Some(server)
    }

    /// `data` of an answer of its API.
    pub async fn get(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let url = format!("http://127.0.0.1:{}/api/v1/{path}", self.port);
        let url = Url::parse_with_params(&url, parameters).expect("a URL");
        let mut answer = self
            .http
            .get(url.as_str())
            .send()
            .await
            .expect("it answers");
        let mut answer: Value = answer.json().await.expect("JSON");
        assert_eq!(answer["status"], "success", "{parameters:?}: {answer}");
        answer["data"].take()
    }

    /// The values of a query, those that are no number apart.
    pub async fn numbers(&self, query: &str) -> Vec<f64> {
        let data = self.get("query", &[("query", query)]).await;
        let result = data["result"].as_array().expect("a vector");
        let values = result.iter().map(|sample| &sample["value"][1]);
        let values = values.map(|value| value.as_str().expect("text").parse::<f64>());
        let values = values.map(|value| value.expect("a number"));
        values.filter(|value| value.is_finite()).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
