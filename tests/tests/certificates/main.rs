//! TLS to registries: which servers the coordinator trusts and how it identifies itself, compared with skopeo on the same certificates.
//!
//! skopeo uses Go's library to verify certificates, as docker does.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use coordinator::registries::oci::docker_config::CredentialStore;
use coordinator::registries::oci::registry::OciRegistry;
use coordinator::registries::oci::retry::RetryPolicy;
use coordinator::registries::oci::transport::TransportSettings;
use coordinator::registries::{Registry, RegistryError};
use store::reader::Store;
use tempfile::TempDir;
use tests::images::small;
use tests::process::run;
use tests::registry::{CertificateSpec, OpensslServer, make_certificate, write_manifest};
use tests::site::{Site, SiteSpec};

use kinds::{CERTIFICATES, KINDS, Kind, Verdict};

mod kinds;

/// The error for an image whose manifest was read over TLS. `openssl s_server` serves no file with a colon in its name,
/// and the names of configs have one.
const NO_CONFIG: &str = "the config of";

/// Clients that connect at the same time.
const THREADS: usize = 4;

/// The servers' files, all certificates, and the directory where clients look for the certificates of registries.
struct Stage {
    directory: TempDir,
    runtime: tokio::runtime::Runtime,
    store: Store,
}

impl Stage {
    fn new(certificates: &[CertificateSpec]) -> Result<Stage> {
        let directory = tempfile::tempdir()?;
        for name in ["answers", "certificates", "home/.config/containers/certs.d", "store"] {
            std::fs::create_dir_all(directory.path().join(name))?;
        }
        write_manifest(&directory.path().join("answers"), &small()?, "app", "1")?;
        for spec in certificates {
            make_certificate(&directory.path().join("certificates"), spec)?;
        }
        let store = directory.path().join("store");
        store::publisher::create(&store)?;
        Ok(Stage { directory, runtime: tokio::runtime::Runtime::new()?, store: Store::open(&store)? })
    }

    /// Starts a server with a certificate chain, its own certificate first. With `clients_of`, only clients of that authority are let in.
    fn serve(&self, chain: &[&str], clients_of: Option<&str>, arguments: &[&str]) -> Result<OpensslServer> {
        let mut all = self.identity(chain)?;
        if let Some(authority) = clients_of {
            all.extend(["-Verify", "3", "-verify_return_error", "-CAfile"].map(str::to_owned));
            all.push(self.certificate(&format!("{authority}.crt")).display().to_string());
        }
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        OpensslServer::start(&self.directory.path().join("answers"), &all)
    }

    /// The arguments that give a server its certificate.
    fn identity(&self, chain: &[&str]) -> Result<Vec<String>> {
        let file = |name: String| self.certificate(&name).display().to_string();
        let mut arguments = vec!["-cert".to_owned(), file(format!("{}.crt", chain[0]))];
        arguments.extend(["-key".to_owned(), file(format!("{}.key", chain[0]))]);
        if let [_, between @ ..] = chain
            && !between.is_empty()
        {
            let path = file(format!("{}.chain", chain.join("+")));
            let texts: Result<Vec<_>> = between.iter().map(|name| self.text(&format!("{name}.crt"))).collect();
            std::fs::write(&path, texts?.concat())?;
            arguments.extend(["-cert_chain".to_owned(), path]);
        }
        Ok(arguments)
    }

    fn certificate(&self, file: &str) -> PathBuf {
        self.directory.path().join("certificates").join(file)
    }

    fn text(&self, file: &str) -> Result<String> {
        std::fs::read_to_string(self.certificate(file)).with_context(|| format!("no {file}"))
    }

    fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// The directory of a registry's certificates.
    fn own(&self, registry: &str) -> PathBuf {
        self.home().join(".config/containers/certs.d").join(registry)
    }

    /// Creates a registry's directory with these files. The content is names of certificates and keys (`ca.crt+self.crt`), or else a text.
    fn give(&self, registry: &str, files: &[(&str, &str)]) -> Result<()> {
        let directory = self.own(registry);
        if directory.exists() {
            std::fs::remove_dir_all(&directory)?;
        }
        std::fs::create_dir(&directory)?;
        for (name, content) in files {
            let texts: Option<Vec<_>> = content.split('+').map(|file| self.text(file).ok()).collect();
            std::fs::write(directory.join(name), texts.map_or((*content).to_owned(), |texts| texts.concat()))?;
        }
        Ok(())
    }

    /// The coordinator's registry client, which looks for certificates where skopeo does.
    fn client(&self) -> Result<OciRegistry> {
        let retry = RetryPolicy { attempts: 2, base: Duration::from_millis(5), ..RetryPolicy::default() };
        let certs_d = vec![self.home().join(".config/containers/certs.d")];
        let settings = TransportSettings { certs_d, retry, ..TransportSettings::default() };
        Ok(OciRegistry::new(&settings, CredentialStore::default(), self.store.clone(), Arc::default())?)
    }

    /// Resolves the image with a new registry client of the coordinator.
    fn ours(&self, registry: &str) -> Result<Result<(), RegistryError>> {
        self.ask(&self.client()?, &format!("{registry}/app:1"))
    }

    /// Resolves the image with a client that may have been used before. A missing config counts as success: see [`NO_CONFIG`].
    fn ask(&self, client: &OciRegistry, image: &str) -> Result<Result<(), RegistryError>> {
        match self.runtime.block_on(client.resolve(&image.parse()?, None)) {
            Ok(_) => bail!("{image} has a config"),
            Err(error) if error.to_string().contains(NO_CONFIG) => Ok(Ok(())),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Reads the manifest with skopeo.
    fn skopeo(&self, registry: &str) -> Result<Result<(), String>> {
        self.skopeo_of(&format!("{registry}/app:1"))
    }

    fn skopeo_of(&self, image: &str) -> Result<Result<(), String>> {
        let mut command = Command::new("skopeo");
        command.args(["inspect", "--raw", "--no-creds", &format!("docker://{image}")]);
        let output = run(command.env("HOME", self.home()))?;
        Ok(if output.succeeded() { Ok(()) } else { Err(output.stderr) })
    }
}

/// How the outcome differs from the table; `None` if it does not.
fn difference(stage: &Stage, Kind(chain, trusted, arguments, verdict): &Kind) -> Result<Option<String>> {
    let server = stage.serve(chain, None, arguments)?;
    let registry = format!("localhost:{}", server.port());
    stage.give(&registry, &[("ca.crt", &format!("{trusted}.crt"))])?;
    let (ours, theirs) = (stage.ours(&registry)?, stage.skopeo(&registry)?);
    let is_right = match (verdict, &ours, &theirs) {
        (Verdict::Trusted, Ok(()), Ok(())) => true,
        (Verdict::Refused(words), Err(error), Err(_)) | (Verdict::RefusedHere(words), Err(error), Ok(())) => {
            error.to_string().contains(words)
        }
        _ => false,
    };
    Ok((!is_right).then(|| format!("{chain:?} by {trusted} {arguments:?}: ours {ours:?}, skopeo {theirs:?}")))
}

#[test]
fn every_kind_of_certificate_is_trusted_as_go_trusts_it_or_listed() {
    let stage = Stage::new(CERTIFICATES).unwrap();
    let next = AtomicUsize::new(0);
    let differences: Vec<String> = std::thread::scope(|scope| {
        let work = || {
            let kinds = std::iter::from_fn(|| KINDS.get(next.fetch_add(1, Ordering::Relaxed)));
            kinds.filter_map(|kind| difference(&stage, kind).unwrap()).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(differences.is_empty(), "{differences:#?}");
}

const AUTHORITY: &str = "basicConstraints=critical,CA:TRUE\n";
const SERVER: &str = "subjectAltName=DNS:localhost,IP:127.0.0.1\n";

const fn spec(name: &'static str, issuer: Option<&'static str>, extensions: &'static str) -> CertificateSpec {
    CertificateSpec { name, key: "P-256", issuer, extensions, arguments: &[] }
}

/// The certificates of the tests below.
const FEW: &[CertificateSpec] = &[
    spec("ca", None, AUTHORITY),
    spec("other-ca", None, AUTHORITY),
    spec("between", Some("ca"), AUTHORITY),
    spec("server", Some("ca"), SERVER),
    spec("client", Some("ca"), "extendedKeyUsage=clientAuth\n"),
    spec("other-client", Some("other-ca"), "extendedKeyUsage=clientAuth\n"),
    spec("far-client", Some("between"), "extendedKeyUsage=clientAuth\n"),
    // As `openssl x509 -req` makes it, and as many instructions describe.
    spec("old-client", Some("ca"), ""),
    CertificateSpec { key: "P-521", ..spec("p521-client", Some("ca"), "extendedKeyUsage=clientAuth\n") },
    CertificateSpec { key: "RSA:2048", ..spec("rsa-client", Some("ca"), "extendedKeyUsage=clientAuth\n") },
    CertificateSpec { key: "RSA:1024", ..spec("short-client", Some("ca"), "extendedKeyUsage=clientAuth\n") },
    CertificateSpec { key: "ed25519", ..spec("ed25519-client", Some("ca"), "extendedKeyUsage=clientAuth\n") },
];

/// The files in a registry's directory besides `ca.crt`; whether the registry accepts only clients of the authority
/// `ca`; and the text of the refusal, which is empty if the image can be read. skopeo reads and refuses the same.
struct Files(&'static [(&'static str, &'static str)], bool, &'static str);

const DIRECTORIES: &[Files] = &[
    Files(&[], false, ""),
    Files(&[], true, "it wants a certificate of ours"),
    Files(&[("a.cert", "client.crt"), ("a.key", "client.key")], true, ""),
    Files(&[("a.cert", "client.crt"), ("a.key", "client.key")], false, ""),
    Files(&[("a.cert", "client.crt+client.key"), ("a.key", "client.crt+client.key")], true, ""),
    Files(&[("a.cert", "old-client.crt"), ("a.key", "old-client.key")], true, ""),
    Files(&[("a.cert", "p521-client.crt"), ("a.key", "p521-client.key")], true, ""),
    Files(&[("a.cert", "rsa-client.crt"), ("a.key", "rsa-client.key")], true, ""),
    Files(&[("a.cert", "ed25519-client.crt"), ("a.key", "ed25519-client.key")], true, ""),
    Files(&[("a.cert", "far-client.crt+between.crt"), ("a.key", "far-client.key")], true, ""),
    // The server lists the authorities that it trusts, and the first matching certificate is sent.
    Files(
        &[
            ("a.cert", "other-client.crt"),
            ("a.key", "other-client.key"),
            ("b.cert", "client.crt"),
            ("b.key", "client.key"),
        ],
        true,
        "",
    ),
    Files(&[("a.cert", "other-client.crt"), ("a.key", "other-client.key")], true, "it wants a certificate of ours"),
    // Half a pair, certificates and keys that do not match, and files that are no certificate or key.
    Files(&[("a.cert", "client.crt")], false, "a.key is missing, the private key of"),
    Files(&[("a.key", "client.key")], false, "a.cert is missing, the certificate of"),
    Files(&[("a.crt", "client.crt"), ("a.key", "client.key")], false, "a.cert is missing, the certificate of"),
    Files(&[("a.cert", "client.crt"), ("a.key", "other-client.key")], false, "a.key is not the private key of"),
    Files(&[("a.cert", ""), ("a.key", "client.key")], false, "a.cert holds no certificate in PEM"),
    Files(&[("a.cert", "client.crt"), ("a.key", "rubbish")], false, "a.key holds no private key in PEM"),
    // File names without a meaning, and files that hold no authority.
    Files(&[("a.pem", "client.crt"), ("a.CRT", "rubbish"), ("key", "x"), ("README", "x")], false, ""),
    Files(&[("a.crt", "rubbish"), ("b.crt", "")], false, ""),
    Files(&[("ca.crt", "rubbish")], false, "ca.crt holds no certificate in PEM"),
    Files(&[("ca.crt", "other-ca.crt")], false, "not trusted"),
    Files(&[("ca.crt", "ca.key")], false, "ca.crt holds no certificate in PEM"),
    Files(
        &[("ca.crt", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), (".crt", "ca.crt")],
        false,
        "",
    ),
    Files(
        &[("ca.crt", "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n"), ("b.crt", "ca.crt")],
        false,
        "",
    ),
    Files(&[("ca.crt", "ca.crt+other-ca.crt+client.key")], false, ""),
];

#[test]
fn a_registrys_directory_of_certificates_is_read_as_docker_reads_it() {
    let stage = Stage::new(FEW).unwrap();
    let open = stage.serve(&["server"], None, &[]).unwrap();
    let closed = stage.serve(&["server"], Some("ca"), &[]).unwrap();
    for Files(files, is_closed, says) in DIRECTORIES {
        let port = if *is_closed { closed.port() } else { open.port() };
        let registry = format!("localhost:{port}");
        let all: Vec<_> = [("ca.crt", "ca.crt")].iter().chain(*files).copied().collect();
        stage.give(&registry, &all).unwrap();
        let (ours, theirs) = (stage.ours(&registry).unwrap(), stage.skopeo(&registry).unwrap());
        let said = ours.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let is_right = ours.is_ok() == says.is_empty() && said.contains(says) && theirs.is_ok() == says.is_empty();
        assert!(is_right, "{files:?}: ours {ours:?}, skopeo {theirs:?}");
    }
}

#[test]
fn what_only_this_project_refuses_of_clients_certificates_is_told() {
    let stage = Stage::new(FEW).unwrap();
    let closed = stage.serve(&["server"], Some("ca"), &["-cipher", "ALL:@SECLEVEL=0"]).unwrap();
    let registry = format!("localhost:{}", closed.port());
    // Signatures with such a short key can be forged, and ring does not make them.
    stage
        .give(&registry, &[("ca.crt", "ca.crt"), ("a.cert", "short-client.crt"), ("a.key", "short-client.key")])
        .unwrap();
    let said = stage.ours(&registry).unwrap().unwrap_err().to_string();
    assert!(said.contains("a.key holds a private key of a kind that is not known here"), "{said}");
}

#[test]
fn a_directory_counts_for_the_registry_whose_name_it_has_letter_by_letter() {
    let stage = Stage::new(FEW).unwrap();
    let server = stage.serve(&["server"], None, &[]).unwrap();
    let port = server.port();
    for (directory, registry, counts) in [
        (format!("localhost:{port}"), format!("localhost:{port}"), true),
        (format!("127.0.0.1:{port}"), format!("127.0.0.1:{port}"), true),
        ("localhost".to_owned(), format!("localhost:{port}"), false),
        (format!("127.0.0.1:{port}"), format!("localhost:{port}"), false),
        (format!("LOCALHOST:{port}"), format!("localhost:{port}"), false),
        (format!("localhost:{port}"), format!("LOCALHOST:{port}"), false),
        (format!("LOCALHOST:{port}"), format!("LOCALHOST:{port}"), true),
    ] {
        stage.give(&directory, &[("ca.crt", "ca.crt")]).unwrap();
        let (ours, theirs) = (stage.ours(&registry).unwrap(), stage.skopeo(&registry).unwrap());
        assert_eq!((ours.is_ok(), theirs.is_ok()), (counts, counts), "{directory} for {registry}: {ours:?} {theirs:?}");
        std::fs::remove_dir_all(stage.own(&directory)).unwrap();
    }
}

#[test]
fn certificates_count_wherever_their_registry_leads_and_for_no_other() {
    let stage = Stage::new(FEW).unwrap();
    let storage = stage.serve(&["server"], Some("ca"), &[]).unwrap();
    let home = format!("127.0.0.1:{}", storage.port());
    let server = stage.serve(&["server"], None, &[]).unwrap();
    // A registry that redirects to storage that requires a client certificate.
    let manifest = stage.directory.path().join("answers/v2/app/manifests/led");
    let to =
        format!("HTTP/1.0 307 Elsewhere\r\nLocation: https://{home}/v2/app/manifests/1\r\nContent-Length: 0\r\n\r\n");
    std::fs::write(manifest, to).unwrap();
    let registry = format!("localhost:{}", server.port());
    let own = [("ca.crt", "ca.crt"), ("a.cert", "client.crt"), ("a.key", "client.key")];
    for (directory, files, is_let_in) in
        [(&registry, &own[..], true), (&registry, &own[..1], false), (&home, &own[..], false)]
    {
        stage.give(&registry, &own[..1]).unwrap();
        stage.give(directory, files).unwrap();
        let image = format!("{registry}/app:led");
        let client = stage.client().unwrap();
        let ours = stage.ask(&client, &image).unwrap();
        let skopeo = stage.skopeo_of(&image).unwrap();
        assert_eq!((ours.is_ok(), skopeo.is_ok()), (is_let_in, is_let_in), "{directory}: {ours:?} {skopeo:?}");
        // The same client then uses the storage as a registry, which has no directory. It must not use the other registry's certificates.
        if is_let_in {
            let error = stage.ask(&client, &format!("{home}/app:1")).unwrap().unwrap_err().to_string();
            assert!(error.contains("not trusted"), "{error}");
        }
    }
}

#[test]
fn certificates_are_followed_while_the_coordinator_runs() {
    let stage = Stage::new(FEW).unwrap();
    let server = stage.serve(&["server"], Some("ca"), &[]).unwrap();
    let registry = format!("localhost:{}", server.port());
    let environment = vec![("HOME".to_owned(), stage.home().display().to_string())];
    let site = Site::start_with(&SiteSpec { environment, ..SiteSpec::default() }).unwrap();
    let pull = || site.ctl().run(&["pull", &format!("{registry}/app:1")]).unwrap();
    let trusted = || {
        let output = pull();
        assert!(output.stderr.contains(NO_CONFIG), "{}", output.stderr);
    };
    let refused = |words: &str| {
        let output = pull();
        let is_told = !output.succeeded() && output.stderr.contains(words);
        assert!(is_told, "{words} is not in {}", output.stderr);
    };
    refused("not trusted");
    stage.give(&registry, &[("ca.crt", "ca.crt")]).unwrap();
    refused("it wants a certificate of ours: put NAME.cert and NAME.key");
    stage.give(&registry, &[("ca.crt", "ca.crt"), ("a.cert", "client.crt"), ("a.key", "client.key")]).unwrap();
    trusted();
    // While the files are being replaced, the previous pair stays in use.
    std::fs::copy(stage.certificate("old-client.crt"), stage.own(&registry).join("a.cert")).unwrap();
    trusted();
    std::fs::copy(stage.certificate("old-client.key"), stage.own(&registry).join("a.key")).unwrap();
    trusted();
    stage
        .give(&registry, &[("ca.crt", "ca.crt"), ("a.cert", "other-client.crt"), ("a.key", "other-client.key")])
        .unwrap();
    refused("certificate");
    std::fs::remove_dir_all(stage.own(&registry)).unwrap();
    refused("not trusted");
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let stage = Stage::new(FEW).unwrap();
    let server = stage.serve(&["server"], None, &[]).unwrap();
    let registry = format!("localhost:{}", server.port());
    stage.give(&registry, &[]).unwrap();
    std::fs::create_dir(stage.own(&registry).join("ca.crt")).unwrap();
    check(&stage, &registry, "ca.crt cannot be read: Is a directory").unwrap();
    stage.give(&registry, &[("a.crt", &"x".repeat(2 << 20))]).unwrap();
    check(&stage, &registry, "a.crt is larger than 1048576 bytes").unwrap();
    let many: Vec<String> = (0..101).map(|number| format!("{number}.crt")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "ca.crt")).collect();
    stage.give(&registry, &many).unwrap();
    check(&stage, &registry, "holds more than 100 certificates and keys").unwrap();
}

fn check(stage: &Stage, registry: &str, words: &str) -> Result<()> {
    let said = stage.ours(registry)?.err().map(|error| error.to_string()).unwrap_or_default();
    let is_told = said.contains(words) && said.contains("the certificates for registry");
    ensure!(is_told && said.contains(&stage.own(registry).display().to_string()), "{said}");
    Ok(())
}
