//! The integration tests. They are one binary, because linking the four broker clients takes longer
//! than compiling the tests.

#[cfg(not(feature = "failpoints"))]
compile_error!("the tests need fault points: run tests/run, or cargo test --features failpoints");

mod admin;
mod api;
mod apis;
mod bad_requests;
mod bodies;
mod check;
mod cloud_events;
mod command_line;
mod concurrency;
mod connect;
mod containers;
mod control;
mod durable;
mod end_to_end;
mod events;
mod faults;
mod fleet;
mod foreign;
mod grpc;
mod idempotency;
mod ingest;
mod lane;
mod letters;
mod load;
mod log;
mod model;
mod nats;
mod output;
mod page;
mod parking;
mod plain;
mod planted;
mod post_rules;
mod power_cuts;
mod promise;
mod pubsub;
mod rabbitmq;
mod readme;
mod refusals;
mod reload;
mod router;
mod routing;
mod signatures;
mod simulate;
mod sink;
mod spool;
mod supervisor;
mod support;
mod tls;
mod tokens;
mod traffic;
mod transport_contract;
mod trouble;
