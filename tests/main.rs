//! The integration tests, as one binary: linking the four broker clients costs more than compiling the tests.

mod admin;
mod api;
mod check;
mod containers;
mod end_to_end;
mod faults;
mod grpc;
mod ingest;
mod lane;
mod load;
#[cfg(feature = "failpoints")]
mod model;
mod nats;
mod pubsub;
mod rabbitmq;
mod router;
mod simulated_time;
mod sink;
mod spool;
mod support;
mod traffic;
mod transport_contract;
