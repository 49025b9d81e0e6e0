//! The integration tests, as one binary: linking the four broker clients costs more than compiling the tests.

mod pubsub;
mod support;
mod transport_contract;
