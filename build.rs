//! Compiles the gRPC service from `proto/` with a pure Rust compiler, so that no `protoc` is
//! needed, and keeps the descriptors that server reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    const PROTO: &str = "proto/waypost/v1/waypost.proto";
    println!("cargo::rerun-if-changed={PROTO}");
    let descriptors = protox::compile([PROTO], ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("waypost.bin"), descriptors.encode_to_vec())?;
    // A record's body is handed from the wire to the API without a copy.
    tonic_prost_build::configure()
        .bytes(".waypost.v1.Record.body")
        .compile_fds(descriptors)?;
    Ok(())
}
