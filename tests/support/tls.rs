//! Certificates for tests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tempfile::TempDir;

/// Makes a self-signed certificate for `name` (as `DNS:localhost`, `IP:127.0.0.1`) and its key in
/// `folder`. `None` if `openssl` is not installed, which is a failure in CI.
pub fn certificate(folder: &Path, name: &str) -> Option<(PathBuf, PathBuf)> {
    let cert = folder.join("cert.pem");
    let key = folder.join("key.pem");
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            &format!("subjectAltName={name}"),
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output();
    let Ok(made) = made else {
        super::missing("openssl");
        return None;
    };
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    Some((cert, key))
}

/// A server's TLS configuration with such a certificate.
pub fn server(cert: &Path, key: &Path) -> Arc<ServerConfig> {
    let chain = vec![CertificateDer::from_pem_file(cert).unwrap()];
    let key = PrivateKeyDer::from_pem_file(key).unwrap();
    Arc::new(
        ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap(),
    )
}

/// Signs certificates.
pub struct Authority {
    folder: TempDir,
    cert: String,
    serial: AtomicU32,
}

impl Authority {
    /// A new one. `None` if `openssl` is not installed, which is a failure in CI.
    pub fn new() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let basic = "basicConstraints=critical,CA:TRUE";
        let made = openssl(
            folder.path(),
            &[
                &["req", "-x509"],
                NEW_KEY,
                &["-subj", "/CN=authority", "-addext", basic],
            ]
            .concat(),
        )?;
        assert!(made.status.success(), "{made:?}");
        let cert = fs::read_to_string(folder.path().join("out.pem")).expect("it is made");
        fs::write(folder.path().join("ca.pem"), &cert).expect("room");
        let (new, own) = ("new-key.pem", "ca-key.pem");
        fs::rename(folder.path().join(new), folder.path().join(own)).expect("our folder");
        Some(Self {
            folder,
            cert,
            serial: AtomicU32::new(1),
        })
    }

    /// Its own certificate, in PEM.
    pub fn cert(&self) -> &str {
        &self.cert
    }

    /// A certificate for this host name, and its key, in PEM.
    pub fn issue(&self, name: &str) -> (String, String) {
        let folder = self.folder.path();
        let san = format!("subjectAltName=DNS:{name}");
        let subject = format!("/CN={name}");
        let request = [&["req"], NEW_KEY, &["-subj", &subject, "-addext", &san]].concat();
        let made = openssl(folder, &request).expect("it is installed");
        assert!(made.status.success(), "{made:?}");
        fs::rename(folder.join("out.pem"), folder.join("request.pem")).expect("our folder");
        let serial = self.serial.fetch_add(1, Relaxed).to_string();
        let sign = ["x509", "-req", "-in", "request.pem", "-days", "2"];
        let by = [
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca-key.pem",
            "-set_serial",
            &serial,
        ];
        let how = ["-copy_extensions", "copy", "-out", "out.pem"];
        let made = openssl(folder, &[&sign[..], &by, &how].concat()).expect("it is installed");
        assert!(made.status.success(), "{made:?}");
        let read = |name| fs::read_to_string(folder.join(name)).expect("it is made");
        (read("out.pem"), read("new-key.pem"))
    }
}

/// The arguments for a new key, and for a certificate or the request for one.
const NEW_KEY: &[&str] = &[
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:prime256v1",
    "-nodes",
    "-days",
    "2",
    "-keyout",
    "new-key.pem",
    "-out",
    "out.pem",
];

/// Runs it in `folder`. `None` if it is not installed, which is a failure in CI.
fn openssl(folder: &Path, arguments: &[&str]) -> Option<Output> {
    let run = Command::new("openssl")
        .args(arguments)
        .current_dir(folder)
        .output();
    if run.is_err() {
        super::missing("openssl");
    }
    run.ok()
}
