//! One suite of guarantees, held against every transport: see `waypost::actors::transport`.
