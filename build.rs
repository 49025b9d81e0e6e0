//! Compiles the gRPC service from `proto/` with a pure Rust compiler, so that no `protoc` is needed,
//! and keeps the descriptors that server reflection serves.

use std::{env, error::Error, fs, path::PathBuf, process::Command};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    const PROTO: &str = "proto/waypost/v1/waypost.proto";
    println!("cargo::rerun-if-changed={PROTO}");
    let descriptors = protox::compile([PROTO], ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("waypost.bin"), descriptors.encode_to_vec())?;
    // A record's body is handed from the wire to the API without a copy.
    tonic_prost_build::configure().bytes(".waypost.v1.Record.body").compile_fds(descriptors)?;
    if env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu") && glibc().is_some_and(|version| version >= (2, 36)) {
        // Else 0.8 MiB of relocations are read at each start, and stay in memory. Older loaders cannot read them packed.
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    Ok(())
}

/// The version of the C library that the program is built against, if it is glibc.
fn glibc() -> Option<(u32, u32)> {
    let told = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let version = String::from_utf8(told.stdout).ok()?;
    let (major, minor) = version.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
