//! What an operator can do about a connection that fails, by a part of the error's text: the clients
//! have no common type for it.

/// A part of the text of errors, and their remedy.
pub type Remedy = (&'static str, &'static str);

/// The remedies for all systems.
const COMMON: &[Remedy] = &[
    (
        "Connection refused",
        "no server listens there: start it, or correct the address",
    ),
    ("failed to lookup address", "no such host: correct its name"),
    (
        "InvalidContentType",
        "the server speaks no TLS at this port: use its TLS port, or the scheme without TLS",
    ),
    (
        "invalid peer certificate",
        "set `ca_file` to the authority of the server's certificate, and the host to a name in it",
    ),
    (
        "Address already in use",
        "another process listens there: end it, or choose another address",
    ),
    (
        "no answer within",
        "a firewall may drop the connection, or the server may wait for TLS",
    ),
];

/// `why`, and what to do about it where that is known. The remedies of the system itself come
/// first.
pub fn with_remedy(why: String, own: &[Remedy]) -> String {
    let mut known = own.iter().chain(COMMON);
    match known.find(|(part, _)| why.contains(part)) {
        Some((_, remedy)) => format!("{why}; {remedy}"),
        None => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_followed_by_its_own_remedy_or_a_common_one_if_any() {
        let own = [("vhost", "use %2f"), ("refused", "log in")];
        for (why, told) in [
            ("vhost / not found", "vhost / not found; use %2f"),
            ("login refused", "login refused; log in"),
            ("disk on fire", "disk on fire"),
        ] {
            assert_eq!(with_remedy(why.into(), &own), told);
        }
        let told = with_remedy("Connection refused (os error 111)".into(), &own);
        assert!(
            told.ends_with("; log in"),
            "the system's own is first: {told}"
        );
        let told = with_remedy("Connection refused (os error 111)".into(), &[]);
        assert!(told.contains("start it"), "{told}");
    }
}
