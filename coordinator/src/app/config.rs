//! Turns flags, environment and file into one checked [`Config`]. Nothing else reads any of them.
//!
//! The command line takes precedence over the environment, and the environment over the file. Unknown keys in the file are
//! refused: a misspelt limit must not silently mean no limit.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use coordinator_api::access::Role;
use coordinator_api::address::DEFAULT_SOCKET;
use coordinator_api::quantity::{Size, parse_duration};
use coordinator_api::report;
use serde::Deserialize;
use store::crash::{self, CrashPoint};
use store::handover_log::{HandoverKey, SECRET_MIN};
use store::image::parse_registry;

use crate::identity::caller::{Images, LocalRule, Subject};
use crate::identity::image_pattern::BadPattern;
use crate::profiles::Guesses;
use crate::registries::limits::DEFAULT_PARALLEL_LAYERS;
use crate::registries::oci::retry::RetryPolicy;
use crate::registries::oci::transport::TransportSettings;
use crate::registries::webhook::HookSecret;

/// How long a host's lease lives by default.
const HOST_LEASE: Duration = Duration::from_secs(15 * 60);

/// System-wide directories with the certificates of registries.
const CERTS_D: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// The coordinator: pulls images into the shared store, once, and answers hosts and admins.
#[derive(Debug, Parser)]
#[command(name = "cachefs-coordinator", version, after_help = report::EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one shared store until stopped
    #[command(after_help = SERVE_EXAMPLE)]
    Serve(Box<ServeArgs>),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of all commands into a directory
    Man {
        /// The directory
        directory: PathBuf,
    },
}

const SERVE_EXAMPLE: &str = "\
Example:
  cachefs-coordinator serve --store /mnt/shared/store --state /var/lib/cachefs-coordinator

Whatever is not a flag stands in the file of --config; flags go before the environment, and that before the file.";

/// The flags of `serve`.
#[derive(Debug, Clone, Default, Args)]
pub struct ServeArgs {
    /// Directory of the shared store; an empty one becomes a new store
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Directory for the coordinator's own database, on a local disk
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Unix socket to listen on [default: /run/cachefs/coordinator.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// TCP address to listen on as well, with TLS and tokens
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// PEM file with the certificate for --listen, then those between it and its authority; read again when it changes
    #[arg(long, value_name = "FILE")]
    pub tls_certificate: Option<PathBuf>,
    /// PEM file with the certificate's private key
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Listen on a loopback address without TLS and tokens: every user of this machine is then an admin
    #[arg(long)]
    pub insecure: bool,
    /// TOML file with these and further settings
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Create the store's directory if it does not exist
    #[arg(long)]
    pub create: bool,
    /// Start with what can still be read of a damaged catalogue
    #[arg(long)]
    pub salvage_catalogue: bool,
    /// Write the store's superblock anew if both of its copies are lost
    #[arg(long)]
    pub salvage_superblock: bool,
    /// What this coordinator calls itself in messages [default: HOSTNAME:PID]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Which messages to log, e.g. info or coordinator=debug
    #[arg(long, value_name = "FILTER", env = "CACHEFS_LOG", default_value = "info")]
    pub log: String,
    /// How to write the log
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Docker's configuration directory, with credentials in config.json [default: ~/.docker]
    #[arg(long, value_name = "DIR", env = "DOCKER_CONFIG", value_parser = path())]
    pub docker_config: Option<PathBuf>,
    /// Die at a crash point, NAME or NAME:NTH; only in builds for tests.
    #[arg(long, value_name = "POINT", env = "CACHEFS_CRASH_AT", hide = true)]
    pub crash_at: Option<String>,
    /// For the default of --docker-config.
    #[arg(long, env = "HOME", hide = true, value_parser = path())]
    pub home: Option<PathBuf>,
}

/// Parses a directory; an environment variable that is set to the empty string gives an empty path.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// How to write the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines, one object a line.
    Json,
}

/// The keys of the configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileConfig {
    store: Option<PathBuf>,
    state: Option<PathBuf>,
    socket: Option<PathBuf>,
    listen: Option<SocketAddr>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    insecure: bool,
    local_access: Vec<FileLocalAccess>,
    host_lease: Option<String>,
    name: Option<String>,
    docker_config: Option<PathBuf>,
    insecure_registries: Vec<String>,
    ca_certificates: Vec<PathBuf>,
    certs_d: Option<Vec<PathBuf>>,
    parallel_jobs: Option<usize>,
    parallel_layers: Option<usize>,
    retry_attempts: Option<u32>,
    blob_cache: Option<Size>,
    guess_starts: Option<bool>,
    webhook_secret_file: Option<PathBuf>,
    handover_key_file: Option<PathBuf>,
}

/// One `[[local_access]]` entry of the file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLocalAccess {
    uid: Option<u32>,
    gid: Option<u32>,
    role: Role,
    #[serde(default)]
    images: Vec<String>,
}

/// A TCP address, and how it is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// How it is protected.
    pub security: Security,
}

/// How a TCP address is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// By TLS and tokens.
    Tls {
        /// The certificate's file.
        certificate: PathBuf,
        /// The private key's file.
        key: PathBuf,
    },
    /// By being reachable from this machine only.
    LoopbackOnly,
}

/// The whole configuration of a coordinator.
#[derive(Debug, Clone)]
pub struct Config {
    /// The shared store's directory.
    pub store: PathBuf,
    /// Whether to create that directory.
    pub create: CreateStore,
    /// The directory of the coordinator's own database.
    pub state: PathBuf,
    /// The unix socket.
    pub socket: PathBuf,
    /// The TCP address.
    pub listen: Option<Listen>,
    /// What users of this machine may do, besides root and the coordinator's own user.
    pub local_access: Vec<LocalRule>,
    /// How long a host's lease lives without being renewed.
    pub host_lease: Duration,
    /// What this coordinator calls itself in messages.
    pub name: String,
    /// Docker's `config.json`, or the directory that contains it.
    pub docker_config: Option<PathBuf>,
    /// Connections to registries.
    pub transport: TransportSettings,
    /// Jobs that run at the same time.
    pub parallel_jobs: usize,
    /// Layers that are fetched at the same time, over all jobs.
    pub parallel_layers: usize,
    /// Bytes of layers to keep as registries sent them; 0 for none.
    pub blob_cache: u64,
    /// Whether to guess what first starts of images need.
    pub guesses: Guesses,
    /// What to do when the catalogue is damaged.
    pub salvage: Salvage,
    /// What to do when the superblock and its copy are lost.
    pub salvage_superblock: Salvage,
    /// The key that authenticates the handover log.
    pub handover_key: Option<HandoverKey>,
    /// The crash point at which to die, and at which pass.
    pub crash_at: Option<(CrashPoint, u32)>,
    /// The secret that webhooks must present.
    pub hook_secret: Option<HookSecret>,
}

/// What to do when the store's directory does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreateStore {
    /// Create it.
    WithDirectory,
    /// Refuse: most likely the shared disk is not mounted.
    InEmptyDirectory,
}

/// What to do when the catalogue is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Salvage {
    /// Go on with what can be read.
    Allowed,
    /// Refuse: data should only be given up knowingly.
    Refused,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {} cannot be read: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file's content is wrong.
    #[error("configuration {} is wrong: {why}", path.display())]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// The line and the reason.
        why: String,
    },
    /// A required setting is missing.
    #[error("--{0} is missing: give it on the command line or as {0} in the configuration file")]
    Missing(&'static str),
    /// An entry of `insecure_registries` names no valid registry.
    #[error("insecure_registries: {0}")]
    InsecureRegistry(String),
    /// A number that must be positive is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// A crash point that this build does not have.
    #[error(
        "--crash-at {0} is not a crash point of this build: it takes NAME or NAME:NTH, in builds with debug assertions"
    )]
    NoCrashPoint(String),
    /// The address could be reached by anybody, without TLS.
    #[error("refusing to listen on {0} without TLS: give --tls-certificate and --tls-key, or --insecure with a loopback address, e.g. 127.0.0.1:{port}", port = .0.port())]
    NoTls(SocketAddr),
    /// Only a part of what TLS needs, or TLS without an address.
    #[error("--tls-certificate, --tls-key and --listen belong together: give all three")]
    HalfTls,
    /// Two settings exclude each other.
    #[error("--insecure is for addresses without TLS: leave it or --tls-certificate out")]
    InsecureTls,
    /// A rule names neither a user nor a group, or both.
    #[error("each [[local_access]] in the configuration file needs either a uid or a gid")]
    Subject,
    /// A rule has an invalid pattern.
    #[error("[[local_access]] in the configuration file: {0}")]
    Pattern(#[from] BadPattern),
    /// The text is no valid duration.
    #[error("{name} = {text:?} is not a duration from a second to a year: write 15m or 1h")]
    Duration {
        /// The key.
        name: &'static str,
        /// Its value.
        text: String,
    },
}

impl Config {
    /// Combines flags and file into a checked configuration.
    pub fn load(args: &ServeArgs) -> Result<Config, ConfigError> {
        let file = match &args.config {
            Some(path) => read_file(path)?,
            None => FileConfig::default(),
        };
        Config::join(args, file)
    }

    fn join(args: &ServeArgs, file: FileConfig) -> Result<Config, ConfigError> {
        let listen = listen(args, &file)?;
        // A variable that is set to the empty string counts as unset.
        let said = |path: &PathBuf| !path.as_os_str().is_empty();
        let docker = args.docker_config.clone().filter(said).or(file.docker_config);
        // System services have no HOME. Like docker and podman, fall back to the user's entry in the system's user database.
        let home = args.home.clone().filter(said).or_else(own_home);
        let docker = docker.or_else(|| home.as_ref().map(|home| home.join(".docker")));
        let mut retry = RetryPolicy::default();
        retry.attempts = at_least_one("retry_attempts", file.retry_attempts.unwrap_or(retry.attempts))?;
        Ok(Config {
            store: args.store.clone().or(file.store).ok_or(ConfigError::Missing("store"))?,
            create: if args.create { CreateStore::WithDirectory } else { CreateStore::InEmptyDirectory },
            state: args.state.clone().or(file.state).ok_or(ConfigError::Missing("state"))?,
            socket: args.socket.clone().or(file.socket).unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET)),
            listen,
            local_access: file.local_access.into_iter().map(local_rule).collect::<Result<_, _>>()?,
            host_lease: file.host_lease.map_or(Ok(HOST_LEASE), |text| duration("host_lease", text))?,
            name: args.name.clone().or(file.name).unwrap_or_else(default_name),
            docker_config: docker,
            transport: TransportSettings {
                insecure_registries: file
                    .insecure_registries
                    .iter()
                    .map(|text| insecure_registry(text))
                    .collect::<Result<_, _>>()?,
                ca_certificates: file.ca_certificates,
                certs_d: file.certs_d.unwrap_or_else(|| certs_d(home.as_ref())),
                retry,
            },
            parallel_jobs: at_least_one("parallel_jobs", file.parallel_jobs.unwrap_or(4))?,
            parallel_layers: at_least_one("parallel_layers", file.parallel_layers.unwrap_or(DEFAULT_PARALLEL_LAYERS))?,
            hook_secret: file.webhook_secret_file.as_deref().map(read_secret).transpose()?,
            blob_cache: file.blob_cache.map_or(0, |Size(bytes)| bytes),
            guesses: if file.guess_starts.unwrap_or(true) { Guesses::Made } else { Guesses::None },
            salvage: if args.salvage_catalogue { Salvage::Allowed } else { Salvage::Refused },
            salvage_superblock: if args.salvage_superblock { Salvage::Allowed } else { Salvage::Refused },
            handover_key: file.handover_key_file.as_deref().map(read_handover_key).transpose()?,
            crash_at: args.crash_at.as_deref().map(crash_at).transpose()?,
        })
    }
}

/// The home directory of the user that this process runs as, from the system's user database.
fn own_home() -> Option<PathBuf> {
    Some(nix::unistd::User::from_uid(nix::unistd::geteuid()).ok()??.dir)
}

/// Where podman and docker look for registries' certificates, in podman's order.
fn certs_d(home: Option<&PathBuf>) -> Vec<PathBuf> {
    let own = home.map(|home| home.join(".config/containers/certs.d"));
    own.into_iter().chain(CERTS_D.map(PathBuf::from)).collect()
}

/// One entry of `insecure_registries`, as the registry's canonical name.
fn insecure_registry(text: &str) -> Result<String, ConfigError> {
    parse_registry(text).map_err(|error| ConfigError::InsecureRegistry(error.to_string()))
}

fn crash_at(text: &str) -> Result<(CrashPoint, u32), ConfigError> {
    let known = crash::parse(text).filter(|_| crash::ENABLED);
    known.ok_or_else(|| ConfigError::NoCrashPoint(text.to_owned()))
}

/// The TCP address, if the settings that protect it are complete.
fn listen(args: &ServeArgs, file: &FileConfig) -> Result<Option<Listen>, ConfigError> {
    let certificate = args.tls_certificate.as_ref().or(file.tls_certificate.as_ref());
    let key = args.tls_key.as_ref().or(file.tls_key.as_ref());
    let insecure = args.insecure || file.insecure;
    let security = match (certificate, key) {
        (Some(_), Some(_)) if insecure => return Err(ConfigError::InsecureTls),
        (Some(certificate), Some(key)) => Some(Security::Tls { certificate: certificate.clone(), key: key.clone() }),
        (None, None) => None,
        _ => return Err(ConfigError::HalfTls),
    };
    match (args.listen.or(file.listen), security) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(ConfigError::HalfTls),
        (Some(address), Some(security)) => Ok(Some(Listen { address, security })),
        (Some(address), None) if insecure && address.ip().is_loopback() => {
            Ok(Some(Listen { address, security: Security::LoopbackOnly }))
        }
        (Some(address), None) => Err(ConfigError::NoTls(address)),
    }
}

fn local_rule(rule: FileLocalAccess) -> Result<LocalRule, ConfigError> {
    let subject = match (rule.uid, rule.gid) {
        (Some(uid), None) => Subject::User(uid),
        (None, Some(gid)) => Subject::Group(gid),
        _ => return Err(ConfigError::Subject),
    };
    Ok(LocalRule { subject, role: rule.role, images: Images::new(rule.images)? })
}

/// Parses a duration such as `15m`, between a second and a year.
fn duration(name: &'static str, text: String) -> Result<Duration, ConfigError> {
    let span = parse_duration(&text).ok();
    let fits = |span: &Duration| (1..=366 * 86_400).contains(&span.as_secs());
    span.filter(fits).ok_or(ConfigError::Duration { name, text })
}

fn at_least_one<T: PartialOrd + From<u8>>(name: &'static str, value: T) -> Result<T, ConfigError> {
    if value >= T::from(1) { Ok(value) } else { Err(ConfigError::Zero(name)) }
}

/// Reads the webhook secret from the first line of a file that only the coordinator should be able to read.
fn read_secret(path: &Path) -> Result<HookSecret, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let why = || "webhook_secret_file is empty: write a long random word into it".to_owned();
    HookSecret::new(&text).ok_or_else(|| ConfigError::Wrong { path: path.to_owned(), why: why() })
}

/// Derives the handover key from a file's first line. Only the coordinator may be able to read the file.
fn read_handover_key(path: &Path) -> Result<HandoverKey, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let wrong = |why: String| ConfigError::Wrong { path: path.to_owned(), why };
    let mode = std::fs::metadata(path).map_err(unreadable)?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(wrong(format!(
            "it is the handover key, and others may read it (mode {:o}): chmod 600 it",
            mode & 0o777
        )));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let secret = text.lines().next().unwrap_or_default().trim();
    HandoverKey::derive(secret.as_bytes()).ok_or_else(|| {
        wrong(format!("its first line is no handover key: write at least {SECRET_MIN} random characters, the same for all coordinators of the store"))
    })
}

fn read_file(path: &Path) -> Result<FileConfig, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        ConfigError::Wrong { path: path.to_owned(), why: format!("{place}{}", error.message()) }
    })
}

/// `host:pid`, which tells coordinators apart in messages.
fn default_name() -> String {
    let host = nix::sys::utsname::uname().ok().and_then(|names| names.nodename().to_str().map(str::to_owned));
    format!("{}:{}", host.unwrap_or_else(|| "coordinator".to_owned()), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ServeArgs {
        ServeArgs { store: Some("/s".into()), state: Some("/t".into()), ..ServeArgs::default() }
    }

    #[test]
    fn flags_go_before_the_file() {
        let file: FileConfig = toml::from_str("store = '/x'\nsocket = '/f.sock'\nparallel_layers = 5").unwrap();
        let empty = Some(PathBuf::new());
        let unset = ServeArgs { docker_config: empty.clone(), home: empty, ..args() };
        // Neither variable says where home is, as in a system service: the user database does.
        let home = own_home().unwrap();
        assert_eq!(Config::join(&unset, FileConfig::default()).unwrap().docker_config, Some(home.join(".docker")));
        let config = Config::join(&args(), file).unwrap();
        assert_eq!(config.store, PathBuf::from("/s"));
        assert_eq!(config.socket, PathBuf::from("/f.sock"));
        assert_eq!((config.parallel_layers, config.parallel_jobs), (5, 4));
    }

    #[test]
    fn certificates_of_registries_lie_where_podman_and_docker_look() {
        let certs_d = |home: &str, text: &str| {
            let args = ServeArgs { home: Some(home.into()), ..args() };
            Config::join(&args, toml::from_str(text).unwrap()).unwrap().transport.certs_d
        };
        let machine = CERTS_D.map(PathBuf::from);
        let own = own_home().unwrap().join(".config/containers/certs.d");
        assert_eq!(certs_d("", ""), [&[own], &machine[..]].concat());
        assert_eq!(certs_d("/h", ""), [&[PathBuf::from("/h/.config/containers/certs.d")], &machine[..]].concat());
        assert_eq!(certs_d("/h", "certs_d = ['/c']"), [PathBuf::from("/c")]);
        assert!(certs_d("/h", "certs_d = []").is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let error =
            |args: &ServeArgs, text: &str| Config::join(args, toml::from_str(text).unwrap()).unwrap_err().to_string();
        assert!(error(&ServeArgs::default(), "").contains("--store is missing"));
        assert!(error(&args(), "parallel_layers = 0").contains("parallel_layers"));
        assert!(error(&args(), "host_lease = 'soon'").contains("host_lease"));
        assert!(error(&args(), "[[local_access]]\nrole = 'viewer'").contains("uid or a gid"));
        assert!(error(&args(), "[[local_access]]\nuid = 1\nrole = 'viewer'\nimages = ['a b']").contains("pattern"));
    }

    #[test]
    fn a_tcp_address_is_protected_or_refused() {
        let join = |address: &str, insecure, tls: &[&str]| {
            let mut tls = tls.iter().map(PathBuf::from);
            let (tls_certificate, tls_key) = (tls.next(), tls.next());
            let listen = address.parse().ok();
            let args = ServeArgs { listen, insecure, tls_certificate, tls_key, ..args() };
            Config::join(&args, FileConfig::default()).map(|config| config.listen).map_err(|error| error.to_string())
        };
        for (address, insecure, tls, words) in [
            ("127.0.0.1:80", false, &[][..], "--insecure"),
            ("0.0.0.0:80", false, &[], "without TLS"),
            ("0.0.0.0:80", true, &[], "loopback address"),
            ("0.0.0.0:80", false, &["c"], "belong together"),
            ("", false, &["c", "k"], "belong together"),
            ("127.0.0.1:80", true, &["c", "k"], "leave it"),
        ] {
            let error = join(address, insecure, tls).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(join("[::1]:80", true, &[]).unwrap().unwrap().security, Security::LoopbackOnly);
        assert!(matches!(join("0.0.0.0:80", false, &["c", "k"]).unwrap().unwrap().security, Security::Tls { .. }));
        assert_eq!(join("", true, &[]), Ok(None));
    }

    #[test]
    fn local_access_and_leases_come_from_the_file() {
        let text = "host_lease = '90s'\n[[local_access]]\nuid = 1000\nrole = 'host'\nimages = ['r/*']\n[[local_access]]\ngid = 5\nrole = 'viewer'";
        let config = Config::join(&args(), toml::from_str(text).unwrap()).unwrap();
        assert_eq!(config.host_lease, Duration::from_secs(90));
        let rules: Vec<_> = config.local_access.iter().map(|rule| (rule.subject, rule.role)).collect();
        assert_eq!(rules, [(Subject::User(1000), Role::Host), (Subject::Group(5), Role::Viewer)]);
    }

    #[test]
    fn the_handover_key_is_long_and_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let read = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            read_handover_key(&path).map_err(|error| error.to_string())
        };
        assert!(read("short", 0o600).unwrap_err().contains("at least 16"));
        assert!(read("a long random word\n", 0o644).unwrap_err().contains("chmod 600"));
        assert_eq!(read("a long random word\nignored", 0o600), Ok(HandoverKey::derive(b"a long random word").unwrap()));
        assert!(read_handover_key(&dir.path().join("none")).is_err());
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "store = '/x'\nparalel_layers = 5\n").unwrap();
        let error = read_file(&path).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("paralel_layers"), "{error}");
    }
}
