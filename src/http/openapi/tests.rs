use std::{collections::BTreeSet, fs, path::Path};

use super::*;

type Operations = BTreeSet<(String, &'static str)>;

const READS: &[&str] = &["get", "head"];

/// The kinds of all problems in a document.
fn kinds(document: &Value) -> Vec<String> {
    let operations = document["paths"].as_object().unwrap().values();
    let operations = operations.flat_map(|path| path.as_object().unwrap().values());
    let answers = operations.flat_map(|operation| operation["responses"].as_object().unwrap());
    let types = answers.filter_map(|(_, answer)| {
        let problem = answer["content"].get(MEDIA_TYPE)?;
        problem["schema"]["properties"]["type"]["enum"].as_array()
    });
    let types = types.flatten().map(|uri| uri.as_str().unwrap());
    types.map(str::to_owned).collect()
}

#[test]
fn each_kind_of_problem_is_in_a_document() {
    let documents = [ingest::tests::document(), admin::tests::document()];
    let found: Vec<_> = documents.iter().flat_map(kinds).collect();
    for kind in ProblemKind::ALL {
        // No path is without its method, and a document has no operation for the others.
        let is_told = found.contains(&kind.uri());
        let is_elsewhere = matches!(kind, ProblemKind::Method | ProblemKind::Database);
        assert_eq!(is_told, !is_elsewhere, "{}", kind.name());
    }
}

/// The source files of a folder and those below, without tests and without the documents.
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "openapi" {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|end| end == "rs") && name != "tests.rs" {
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            found.push((path.display().to_string(), code.to_owned()));
        }
    }
    found
}

/// The operations that a piece of source registers, below `root`.
fn registered(source: &str, root: &str) -> Operations {
    let mut all = Operations::new();
    for (call, methods) in [
        ("read(\"", READS),
        ("order(\"", &["post"]),
        ("web::resource(\"", &[]),
    ] {
        for rest in source.split(call).skip(1) {
            let path = format!("{root}{}", rest.split('"').next().unwrap());
            let resource = rest.split(".default_service(").next().unwrap();
            let others = ["get", "head", "post", "put", "patch", "delete"]
                .into_iter()
                .filter(|method| resource.contains(&format!("web::{method}()")));
            let is_resource = methods.is_empty();
            let methods = methods.iter().copied();
            let methods = methods.chain(others.filter(|_| is_resource));
            let before = all.len();
            all.extend(methods.map(|method| (path.clone(), method)));
            assert!(
                all.len() > before,
                "{path} has no method, or is there twice"
            );
        }
    }
    all
}

/// The operations that a side serves.
fn served(is_of_ingest: bool) -> Operations {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/http");
    let mut all = Operations::new();
    for (path, code) in sources(Path::new(folder)) {
        if path.contains("/ingest") != is_of_ingest {
            continue;
        }
        // Other ways to register a route are not looked for.
        assert!(
            !code.contains(".route(\"") && !code.contains("#[get("),
            "{path}"
        );
        let Some((outer, inner)) = code.split_once("web::scope(\"/api\")") else {
            all.extend(registered(&code, ""));
            continue;
        };
        let (inner, rest) = inner.split_once(".default_service(").unwrap();
        all.extend(registered(outer, ""));
        all.extend(registered(inner, "/api"));
        all.extend(registered(rest, ""));
    }
    all
}

/// The operations that a document describes.
fn described(document: &Value) -> Operations {
    let paths = document["paths"].as_object().unwrap().iter();
    let operations = paths.flat_map(|(path, operations)| {
        let methods = operations.as_object().unwrap().keys();
        methods.map(|method| {
            let known = ["get", "head", "post"].into_iter();
            let method = known.into_iter().find(|known| known == method);
            (path.clone(), method.unwrap())
        })
    });
    operations.collect()
}

#[test]
fn each_operation_that_is_served_is_described_and_no_other() {
    let ingest = served(true);
    assert!(ingest.len() > 5, "{ingest:?}");
    assert_eq!(described(&ingest::tests::document()), ingest);
    let admin = served(false);
    assert!(admin.len() > 20, "{admin:?}");
    assert_eq!(described(&admin::tests::document()), admin);
}

#[test]
fn a_description_links_to_no_code() {
    for document in [ingest::tests::document(), admin::tests::document()] {
        let text = document.to_string();
        assert!(!text.contains("[`"), "{text}");
    }
}
