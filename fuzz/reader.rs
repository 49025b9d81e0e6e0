//! Gives the bytes of the fuzzer to the reader that the variable `READER` names.

#![no_main]

use std::{env, sync::OnceLock};

use libfuzzer_sys::fuzz_target;

static CHECK: OnceLock<fn(&[u8])> = OnceLock::new();

fuzz_target!(
    init: {
        let reader = env::var("READER").expect("READER is set");
        let check = waypost_fuzz::check_of(&reader).expect("READER names a reader");
        CHECK.set(check).expect("it is set once");
    },
    |bytes: &[u8]| CHECK.wait()(bytes)
);
