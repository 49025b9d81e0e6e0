//! Files with secrets. Nothing here shows what they hold: errors name the file and the line.

mod server_tls;
mod tokens;
mod watched;

pub use self::{
    server_tls::{ServerTls, TlsFile, TlsFileError, TlsFiles},
    tokens::{TokenSet, first_token},
    watched::{FileHealth, FileStatus, WatchedFile},
};
