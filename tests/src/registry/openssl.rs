//! Certificates and TLS servers that rustls cannot produce, made and run by `openssl`.

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::free_port;
use crate::images::ImageFiles;
use crate::process::{Process, TIMEOUT, run};

/// The description of a certificate.
#[derive(Debug, Clone, Copy)]
pub struct CertificateSpec {
    /// The name of its files, `NAME.crt` and `NAME.key`, and its common name.
    pub name: &'static str,
    /// Its key: a curve, `ed25519`, `RSA:BITS` or `RSA-PSS:BITS`.
    pub key: &'static str,
    /// The name of its issuer; without one it signs itself.
    pub issuer: Option<&'static str>,
    /// Its extensions, as lines of OpenSSL's configuration. Without any, it is a certificate of X.509 version 1.
    pub extensions: &'static str,
    /// More arguments of `openssl x509`.
    pub arguments: &'static [&'static str],
}

/// Makes a certificate in `directory`, which holds its issuer.
pub fn make_certificate(directory: &Path, spec: &CertificateSpec) -> Result<()> {
    let file = |ending: &str| format!("{}.{ending}", spec.name);
    let openssl = |arguments: &[&str]| -> Result<()> {
        let output = run(Command::new("openssl").args(arguments).current_dir(directory))?.ok();
        output.map(drop).with_context(|| format!("cannot make the certificate {}", spec.name))
    };
    let (algorithm, option) = match spec.key.split_once(':') {
        Some((kind, bits)) => (kind, Some(format!("rsa_keygen_bits:{bits}"))),
        None if spec.key == "ed25519" => ("ed25519", None),
        None => ("EC", Some(format!("ec_paramgen_curve:{}", spec.key))),
    };
    let key = file("key");
    let mut arguments = vec!["genpkey", "-algorithm", algorithm, "-out", &key];
    arguments.extend(option.iter().flat_map(|option| ["-pkeyopt", option.as_str()]));
    openssl(&arguments)?;
    let (request, subject) = (file("csr"), format!("/CN={}", spec.name));
    openssl(&["req", "-new", "-key", &key, "-subj", &subject, "-out", &request])?;
    let (certificate, extensions) = (file("crt"), file("ext"));
    std::fs::write(directory.join(&extensions), format!("[v3]\n{}", spec.extensions))?;
    let mut arguments = vec!["x509", "-req", "-in", &request, "-out", &certificate];
    if !spec.extensions.is_empty() {
        arguments.extend(["-extfile", &extensions, "-extensions", "v3"]);
    }
    if !spec.arguments.contains(&"-days") {
        arguments.extend(["-days", "30"]);
    }
    arguments.extend(spec.arguments);
    let issuer = spec.issuer.map(|issuer| (format!("{issuer}.crt"), format!("{issuer}.key")));
    match &issuer {
        Some((certificate, key)) => arguments.extend(["-CA", certificate, "-CAkey", key, "-CAcreateserial"]),
        None => arguments.extend(["-signkey", &key]),
    }
    openssl(&arguments)
}

/// `openssl s_server`, which answers with files: one connection at a time, one request each, and no path with a colon.
#[derive(Debug)]
pub struct OpensslServer {
    port: u16,
    _process: Process,
}

impl OpensslServer {
    /// Serves the files below `directory` on 127.0.0.1, with these additional arguments. Each file is a whole answer with its headers.
    pub fn start(directory: &Path, arguments: &[String]) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new("openssl");
        command.args(["s_server", "-HTTP", "-cipher", "ALL:@SECLEVEL=0", "-accept", &format!("127.0.0.1:{port}")]);
        command.args(arguments).current_dir(directory);
        let mut process = Process::spawn("openssl", &mut command, &directory.join(format!("s_server-{port}.log")))?;
        process.wait_ready(TIMEOUT, || Ok(TcpStream::connect(("127.0.0.1", port)).is_ok()))?;
        Ok(Self { port, _process: process })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// Writes the answer of a registry that has `image` as `NAME:TAG` to a request for the manifest.
pub fn write_manifest(directory: &Path, image: &ImageFiles, name: &str, tag: &str) -> Result<()> {
    let place = directory.join("v2").join(name).join("manifests");
    std::fs::create_dir_all(&place)?;
    let manifest = image.blob(&image.manifest.digest)?;
    let (media_type, length) = (&image.manifest.media_type, manifest.len());
    let head = format!("HTTP/1.0 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n");
    Ok(std::fs::write(place.join(tag), [head.into_bytes(), manifest].concat())?)
}
