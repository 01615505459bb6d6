//! Certificates and servers of every kind, and the outcome of connecting to each.

use tests::registry::CertificateSpec;

/// A server: its certificate followed by intermediate certificates; the certificate that the client trusts; arguments
/// of `openssl s_server`; and the outcome.
pub(crate) struct Kind(
    pub(crate) &'static [&'static str],
    pub(crate) &'static str,
    pub(crate) &'static [&'static str],
    pub(crate) Verdict,
);

/// The outcome of a connection.
pub(crate) enum Verdict {
    /// Trusted by skopeo and by this project.
    Trusted,
    /// Refused by both. This project's error contains this text.
    Refused(&'static str),
    /// Trusted by skopeo only. This project's error contains this text, and the comment at the row gives the reason.
    RefusedHere(&'static str),
}

use Verdict::{Refused, RefusedHere, Trusted};

/// The names that every server certificate is issued for.
macro_rules! names {
    () => {
        "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
    };
}

/// The extensions of every authority.
macro_rules! authority {
    () => {
        "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign,digitalSignature\n"
    };
}

const fn signed(
    name: &'static str,
    key: &'static str,
    issuer: &'static str,
    extensions: &'static str,
) -> CertificateSpec {
    CertificateSpec { name, key, issuer: Some(issuer), extensions, arguments: &[] }
}

const fn own(name: &'static str, key: &'static str, extensions: &'static str) -> CertificateSpec {
    CertificateSpec { name, key, issuer: None, extensions, arguments: &[] }
}

const fn with(arguments: &'static [&'static str], spec: CertificateSpec) -> CertificateSpec {
    CertificateSpec { arguments, ..spec }
}

/// All certificates, issuers first.
pub(crate) const CERTIFICATES: &[CertificateSpec] = &[
    own("ca", "P-256", authority!()),
    own("ca-p521", "P-521", authority!()),
    own("ca-p224", "secp224r1", authority!()),
    own("ca-ed25519", "ed25519", authority!()),
    own("ca-rsa", "RSA:2048", authority!()),
    own("ca-rsa1024", "RSA:1024", authority!()),
    own("ca-v1", "P-256", ""),
    with(&["-days", "-1"], own("ca-expired", "P-256", authority!())),
    own("ca-no-signer", "P-256", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,digitalSignature\n"),
    own("ca-clients", "P-256", concat!(authority!(), "extendedKeyUsage=clientAuth\n")),
    own("ca-near", "P-256", "basicConstraints=critical,CA:TRUE,pathlen:0\n"),
    own(
        "ca-here",
        "P-256",
        concat!(authority!(), "nameConstraints=critical,permitted;DNS:localhost,permitted;IP:127.0.0.0/255.0.0.0\n"),
    ),
    own("ca-elsewhere", "P-256", concat!(authority!(), "nameConstraints=critical,excluded;DNS:localhost\n")),
    own("self", "P-256", concat!("basicConstraints=CA:FALSE\n", names!())),
    own("self-authority", "P-256", concat!(authority!(), names!())),
    with(&["-days", "-1"], own("self-expired", "P-256", names!())),
    own("self-for-clients", "P-256", concat!(names!(), "extendedKeyUsage=clientAuth\n")),
    signed("between", "P-256", "ca", authority!()),
    signed("between-near", "P-256", "ca-near", authority!()),
    signed("p256", "P-256", "ca", names!()),
    signed("p384", "P-384", "ca", names!()),
    signed("p521", "P-521", "ca", names!()),
    signed("ed25519", "ed25519", "ca", names!()),
    signed("rsa", "RSA:2048", "ca", names!()),
    signed("rsa1024", "RSA:1024", "ca", names!()),
    signed("rsa-pss", "RSA-PSS:2048", "ca", names!()),
    with(&["-sha512"], signed("sha512", "P-256", "ca", names!())),
    signed("by-p521", "P-256", "ca-p521", names!()),
    with(&["-sha384"], signed("by-p521-sha384", "P-521", "ca-p521", names!())),
    with(&["-sha512"], signed("by-p521-sha512", "P-521", "ca-p521", names!())),
    signed("by-p224", "P-256", "ca-p224", names!()),
    signed("by-ed25519", "P-256", "ca-ed25519", names!()),
    signed("by-rsa", "P-256", "ca-rsa", names!()),
    signed("by-rsa1024", "P-256", "ca-rsa1024", names!()),
    with(&["-sha1"], signed("sha1", "P-256", "ca-rsa", names!())),
    signed("by-v1", "P-256", "ca-v1", names!()),
    signed("by-expired", "P-256", "ca-expired", names!()),
    signed("by-no-signer", "P-256", "ca-no-signer", names!()),
    signed("by-clients", "P-256", "ca-clients", names!()),
    signed("by-server", "P-256", "self", names!()),
    signed("by-between", "P-256", "between", names!()),
    signed("by-between-near", "P-256", "between-near", names!()),
    signed("here", "P-256", "ca-here", names!()),
    signed("elsewhere", "P-256", "ca-elsewhere", names!()),
    signed("localhost", "P-256", "ca", "basicConstraints=CA:FALSE\n"),
    signed("other", "P-256", "ca", "subjectAltName=DNS:other.example\n"),
    with(&["-days", "-1"], signed("expired", "P-256", "ca", names!())),
    signed("for-clients", "P-256", "ca", concat!(names!(), "extendedKeyUsage=clientAuth\n")),
    signed("for-servers", "P-256", "ca", concat!(names!(), "extendedKeyUsage=serverAuth,clientAuth\n")),
    signed("for-any", "P-256", "ca", concat!(names!(), "extendedKeyUsage=anyExtendedKeyUsage\n")),
    signed("for-encipherment", "P-256", "ca", concat!(names!(), "keyUsage=critical,keyEncipherment\n")),
    signed("critical", "P-256", "ca", concat!(names!(), "1.2.3.4.5=critical,ASN1:NULL\n")),
    signed("authority", "P-256", "ca", concat!("basicConstraints=critical,CA:TRUE\n", names!())),
    signed("authority-p521", "P-521", "ca-p521", concat!(authority!(), names!())),
    signed("authority-rsa", "RSA:2048", "ca-rsa", concat!(authority!(), names!())),
    signed("authority-other", "P-256", "ca", concat!(authority!(), "subjectAltName=DNS:other.example\n")),
    signed("authority-for-clients", "P-256", "ca", concat!(authority!(), names!(), "extendedKeyUsage=clientAuth\n")),
    with(&["-days", "-1"], signed("authority-expired", "P-256", "ca", concat!(authority!(), names!()))),
    signed("authority-by-expired", "P-256", "ca-expired", concat!(authority!(), names!())),
    signed("authority-by-server", "P-256", "self", concat!(authority!(), names!())),
    signed("authority-by-between", "P-256", "between", concat!(authority!(), names!())),
    signed("authority-here", "P-256", "ca-here", concat!(authority!(), names!())),
];

const EXPIRED: &str = "its certificate has expired";
const UNKNOWN: &str = "signed by an authority that is not trusted";
const PURPOSE: &str = "its certificate is not one for servers";
const OTHER_NAME: &str = "made out for another name";
const SUITES: &str = "no cipher suite or kind of key in common";
const OLD: &str = "knows TLS 1.0 and 1.1 alone";
const UNTRUSTED_AUTHORITY: &str = "neither it nor one that signed it is among the trusted ones";

/// All kinds, observed with skopeo 1.9.3. docker 20.10.24 behaves the same, except with the oldest versions of TLS.
pub(crate) const KINDS: &[Kind] = &[
    // Keys and signatures.
    Kind(&["p256"], "ca", &[], Trusted),
    Kind(&["p256"], "ca", &["-tls1_2"], Trusted),
    Kind(&["p384"], "ca", &[], Trusted),
    Kind(&["p521"], "ca", &[], Trusted),
    Kind(&["p521"], "ca", &["-tls1_2"], Trusted),
    Kind(&["ed25519"], "ca", &[], Trusted),
    Kind(&["rsa"], "ca", &[], Trusted),
    Kind(&["rsa-pss"], "ca", &[], Refused(SUITES)),
    Kind(&["sha512"], "ca", &[], Trusted),
    Kind(&["by-p521"], "ca-p521", &[], Trusted),
    Kind(&["by-p521-sha384"], "ca-p521", &[], Trusted),
    Kind(&["by-p521-sha512"], "ca-p521", &["-tls1_2"], Trusted),
    Kind(&["by-ed25519"], "ca-ed25519", &[], Trusted),
    Kind(&["by-rsa"], "ca-rsa", &[], Trusted),
    Kind(&["by-v1"], "ca-v1", &[], Trusted),
    Kind(&["sha1"], "ca-rsa", &[], Refused("not safe or not known, such as with SHA-1")),
    // Weak keys: browsers and public authorities have refused RSA keys below 2048 bits since 2014, and so does ring. Go
    // 1.24 refuses only keys below 1024 bits.
    Kind(&["rsa1024"], "ca", &[], RefusedHere("its certificate's key has 1024 bits")),
    Kind(&["rsa1024"], "ca", &["-tls1_2"], RefusedHere("its certificate's key has 1024 bits")),
    Kind(&["by-rsa1024"], "ca-rsa1024", &[], RefusedHere("the key of its certificate's authority has 1024 bits")),
    // A curve that TLS 1.3 does not have. No use of it is known.
    Kind(&["by-p224"], "ca-p224", &[], RefusedHere("not safe or not known")),
    // Names, times and purposes.
    Kind(&["localhost"], "ca", &[], Refused("it needs a subjectAltName")),
    Kind(&["other"], "ca", &[], Refused(OTHER_NAME)),
    Kind(&["expired"], "ca", &[], Refused(EXPIRED)),
    Kind(&["for-clients"], "ca", &[], Refused(PURPOSE)),
    Kind(&["for-servers"], "ca", &[], Trusted),
    // A certificate for any purpose that does not name the purpose of servers. No use of such a certificate is known.
    Kind(&["for-any"], "ca", &[], RefusedHere(PURPOSE)),
    Kind(&["for-encipherment"], "ca", &[], Trusted),
    Kind(&["critical"], "ca", &[], Refused("its certificate is not valid")),
    // Authorities.
    Kind(&["p256"], "ca-rsa", &[], Refused(UNKNOWN)),
    Kind(&["by-expired"], "ca-expired", &[], Refused("that signed its certificate has expired")),
    Kind(&["by-no-signer"], "ca-no-signer", &[], Refused(UNKNOWN)),
    Kind(&["by-clients"], "ca-clients", &[], Refused("that signed its certificate is not one for servers")),
    Kind(&["by-server"], "self", &[], Refused(UNKNOWN)),
    Kind(&["here"], "ca-here", &[], Trusted),
    Kind(&["elsewhere"], "ca-elsewhere", &[], Refused("its certificate is not valid")),
    Kind(&["by-between", "between"], "ca", &[], Trusted),
    Kind(&["by-between"], "between", &[], Trusted),
    Kind(&["by-between"], "ca", &[], Refused(UNKNOWN)),
    Kind(&["by-between-near", "between-near"], "ca-near", &[], Refused("may not stand so far above a server")),
    // Server certificates that the client trusts directly, and server certificates that are authorities.
    Kind(&["self"], "self", &[], Trusted),
    Kind(&["self-authority"], "self-authority", &[], Trusted),
    Kind(&["self-expired"], "self-expired", &[], Refused(EXPIRED)),
    Kind(&["self-for-clients"], "self-for-clients", &[], Refused(PURPOSE)),
    Kind(&["p256"], "p256", &[], Trusted),
    Kind(&["self-authority"], "ca", &[], Refused(UNTRUSTED_AUTHORITY)),
    Kind(&["authority"], "ca", &[], Trusted),
    Kind(&["authority-p521"], "ca-p521", &[], Trusted),
    Kind(&["authority-rsa"], "ca-rsa", &[], Trusted),
    Kind(&["authority"], "ca-rsa", &[], Refused(UNTRUSTED_AUTHORITY)),
    Kind(&["authority-other"], "ca", &[], Refused(OTHER_NAME)),
    Kind(&["authority-for-clients"], "ca", &[], Refused(PURPOSE)),
    Kind(&["authority-expired"], "ca", &[], Refused(EXPIRED)),
    Kind(&["authority-by-expired"], "ca-expired", &[], Refused(UNTRUSTED_AUTHORITY)),
    Kind(&["authority-by-server"], "self", &[], Refused(UNTRUSTED_AUTHORITY)),
    // webpki checks chains of more than one signature and name constraints, and it does not accept an authority as a server's certificate.
    Kind(&["authority-by-between", "between"], "ca", &[], RefusedHere(UNTRUSTED_AUTHORITY)),
    Kind(&["authority-here"], "ca-here", &[], RefusedHere(UNTRUSTED_AUTHORITY)),
    // Versions and suites. docker refuses the old versions of TLS too, and rustls does not implement them.
    Kind(&["p256"], "ca", &["-tls1_1"], RefusedHere(OLD)),
    Kind(&["p256"], "ca", &["-tls1"], RefusedHere(OLD)),
    Kind(&["rsa"], "ca", &["-tls1_2", "-cipher", "AES128-GCM-SHA256"], Refused(SUITES)),
    Kind(&["rsa"], "ca", &["-tls1_2", "-cipher", "AES128-SHA"], Refused(SUITES)),
    Kind(&["rsa"], "ca", &["-tls1_2", "-cipher", "ECDHE-RSA-AES128-SHA256"], Refused(SUITES)),
    // CBC with a separate MAC was broken several times by timing attacks (Lucky Thirteen and those like POODLE). rustls
    // does not implement it.
    Kind(&["rsa"], "ca", &["-tls1_2", "-cipher", "ECDHE-RSA-AES128-SHA"], RefusedHere(SUITES)),
    Kind(&["p256"], "ca", &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"], RefusedHere(SUITES)),
    // Groups for key agreement.
    Kind(&["p256"], "ca", &["-groups", "P-521"], Trusted),
    Kind(&["p256"], "ca", &["-groups", "P-521", "-tls1_2"], Trusted),
    Kind(&["p256"], "ca", &["-groups", "P-384"], Trusted),
];
