//! Guarded nodes: the token or the TLS that a node asks for, and the load that has it.

use std::{fs, path::Path, sync::Arc};

use clap::Args;
use waypost::api::{bearer, client::Endpoint, client_tls};

use super::support::tls::certificate;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// The guard of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// One of a thousand tokens.
    Token,
    /// TLS, over connections that are kept.
    Tls,
}

impl Door {
    /// Writes the files in `folder`. Returns the variables of the node, and the options of the load.
    pub fn set_up(self, folder: &Path) -> (Vec<(String, String)>, Vec<String>) {
        let text = |path: &Path| path.to_str().expect("a plain path").to_owned();
        match self {
            Self::Token => {
                let file = folder.join("tokens");
                let others = (1..1000).map(|number| format!("{number:032}\n"));
                let all: String = others.chain([TOKEN.to_owned()]).collect();
                fs::write(&file, all).expect("the folder is ours");
                let variables = vec![("WAYPOST_INGEST__TOKENS_FILE".into(), text(&file))];
                (variables, vec!["--token".into(), TOKEN.into()])
            }
            Self::Tls => {
                let made = certificate(folder, "IP:127.0.0.1");
                let (cert, key) = made.expect("openssl is installed");
                let files = [("CERT", &cert), ("KEY", &key)];
                let variables = files
                    .map(|(name, file)| (format!("WAYPOST_INGEST__TLS_{name}_FILE"), text(file)));
                (variables.into(), vec!["--ca".into(), text(&cert)])
            }
        }
    }
}

/// The options of the load for a guarded node.
#[derive(Args)]
pub struct Credentials {
    #[arg(long)]
    token: Option<String>,
    #[arg(long)]
    ca: Option<String>,
}

impl Credentials {
    pub fn endpoint(&self, host: &str) -> Endpoint {
        let ca = self.ca.as_deref().map(Path::new);
        let tls = || Arc::new(client_tls(ca, None).expect("a certificate"));
        let token = self.token.as_deref();
        let authorization = token.map(|token| bearer(token).expect("a plain token"));
        Endpoint::parse(host, tls)
            .expect("a URL")
            .with_authorization(authorization)
    }
}
