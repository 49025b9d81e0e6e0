//! Programs in Python with packages that tests/run has installed: other people's implementations.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Python with the packages of `target/FOLDER`. `None` if they are not installed, which is a failure
/// in CI.
pub fn python(folder: &str) -> Option<Command> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target")
        .join(folder);
    if !path.is_dir() {
        super::missing(&format!("the Python package {folder}"));
        return None;
    }
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", path);
    Some(python)
}

/// The answers of `program` to each question, a JSON value a line.
pub fn answers(folder: &str, program: &str, asked: &[Value]) -> Option<Vec<Value>> {
    let mut python = python(folder)?
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is there");
    let lines: Vec<_> = asked.iter().map(Value::to_string).collect();
    let lines = lines.join("\n");
    let mut input = python.stdin.take().expect("piped");
    input.write_all(lines.as_bytes()).expect("it reads");
    drop(input);
    let output = python.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let answers = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    Some(answers.collect())
}
