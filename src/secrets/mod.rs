//! Files with secrets. Nothing here shows what they hold: errors name the file and the line.

mod tokens;
mod watched;

pub use self::{
    tokens::{TokenSet, first_token},
    watched::{FileHealth, FileStatus, WatchedFile},
};
