//! Files with secrets. Nothing here shows what they hold: errors name the file and the line.

mod server_tls;
mod serving_tls;
mod signing;
mod tokens;
mod watched;

pub use self::{
    server_tls::{ServerTls, TlsFile, TlsFileError, TlsFiles, WithoutCertificate},
    serving_tls::ServingTls,
    signing::{SigningKeys, parse_timestamp},
    tokens::{TokenSet, first_token, only_token},
    watched::{FileHealth, FileStatus, WatchedFile},
};
