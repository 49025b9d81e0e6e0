//! The integration tests, as one binary: linking the four broker clients costs more than compiling the tests.

mod end_to_end;
mod faults;
mod grpc;
mod ingest;
mod rabbitmq;
mod router;
mod simulated_time;
mod support;
mod traffic;
mod transport_contract;
