//! The operator's configuration: flags and a file, checked once. The only reader of the environment.
//!
//! Flags win over the file. The file is TOML with the flags' names:
//!
//! ```toml
//! store = "/mnt/shared/cachefs"
//! cache = "/var/cache/cachefs"
//! cache-size = "50G"
//! coordinator = "https://coordinator:7411"
//! token-file = "/etc/cachefs/token"
//! ca-certificate = "/etc/cachefs/coordinator.pem"
//! host-name = "node-7"
//! read-timeout = "30s"
//! prefetch = "on"
//! open = "auto"
//! tree = "auto"
//! ```

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use coordinator_api::Credentials;
use coordinator_api::address::Address;
use coordinator_api::credentials::BadToken;
use coordinator_api::quantity::{Size, parse_duration};
use serde::Deserialize;

use crate::content::cache::Prefetch;
use crate::content::cache::disk::Limit;
use crate::filesystem::io_mode::OpenMode;
use crate::filesystem::tree_mounter::Way;

/// How long a read waits for the shared store by default.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A required setting is missing.
    #[error("{0} is needed: give --{0}, or {0} in the file of --config")]
    Lacking(&'static str),
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The file is not valid.
    #[error("the configuration {} is not valid: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        why: String,
    },
    /// The coordinator's address is not valid.
    #[error(transparent)]
    Address(#[from] coordinator_api::address::BadAddress),
    /// The token in the environment is not valid.
    #[error("CACHEFS_TOKEN cannot be used: {0}")]
    Token(#[from] BadToken),
}

/// How long a read waits for the shared store: from 1 ms to 24 hours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Patience(pub Duration);

impl FromStr for Patience {
    type Err = String;

    fn from_str(text: &str) -> Result<Patience, String> {
        let patience = parse_duration(text)?;
        if (Duration::from_millis(1)..=Duration::from_secs(86_400)).contains(&patience) {
            Ok(Patience(patience))
        } else {
            Err(format!("{text:?} is not from 1ms to 24h: write e.g. 30s"))
        }
    }
}

impl TryFrom<String> for Patience {
    type Error = String;

    fn try_from(text: String) -> Result<Patience, String> {
        text.parse()
    }
}

/// The operator's choice of how opens of files are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OpenChoice {
    /// The one that is fastest for most containers: no-open
    Auto,
    /// Opens and warm reads cost no request at all; what is open may leave the local cache, and is then fetched again
    NoOpen,
    /// The kernel reads files in the local cache itself, and open ones stay there (Linux 6.9 or later, else cached)
    Passthrough,
    /// Every open is a request, and what is open stays in the local cache; for old kernels
    Cached,
}

/// `auto` is no-open, which is the fastest for what containers do most. Times relative to native (1.0), below an
/// overlay, medians of 7 on two busy cores with Linux 6.18 (no-open, passthrough, cached):
///
/// - page cache full: open, read and close 5,000 small files 1.3, 6.0, 3.2; tar of 6,000 files 1.1, 2.7, 1.6;
/// - page cache dropped, local cache full: 5,000 small files 2.2, 2.4, 2.4; a start of Python 1.0, 1.1, 1.1; 256 MiB in
///   order 2.1, 1.0, 1.9; 4 KiB at random places of that file 1.7, 1.1, 2.7.
impl From<OpenChoice> for OpenMode {
    fn from(choice: OpenChoice) -> OpenMode {
        match choice {
            OpenChoice::Auto | OpenChoice::NoOpen => OpenMode::NoOpen,
            OpenChoice::Passthrough => OpenMode::Passthrough,
            OpenChoice::Cached => OpenMode::Cached,
        }
    }
}

/// The operator's choice of what engines are given as an image's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TreeChoice {
    /// native where the kernel can mount such trees, else fuse
    Auto,
    /// An EROFS file system for each image: names, attributes, listings and warm reads are the kernel's own
    Native,
    /// The same, always on loop devices, as kernels before 6.12 need it
    Loop,
    /// The mount's own tree
    Fuse,
}

impl TreeChoice {
    /// The ways in which native trees are tried to be mounted, in this order.
    pub fn ways(self) -> &'static [Way] {
        match self {
            TreeChoice::Auto | TreeChoice::Native => &[Way::Files, Way::Loops],
            TreeChoice::Loop => &[Way::Loops],
            TreeChoice::Fuse => &[],
        }
    }

    /// The name of the choice, as it is given.
    pub fn name(self) -> &'static str {
        match self {
            TreeChoice::Auto => "auto",
            TreeChoice::Native => "native",
            TreeChoice::Loop => "loop",
            TreeChoice::Fuse => "fuse",
        }
    }
}

/// The end of `cachefs mount --help`.
pub const MOUNT_EXAMPLE: &str = "\
Example:
  cachefs mount /run/cachefs/mnt --store /mnt/shared/store --cache /var/cache/cachefs --cache-size 50G

Sizes: 50G is 50 * 10^9 bytes, 50Gi is 50 * 2^30. Environment: CACHEFS_TOKEN is the token itself, CACHEFS_LOG what to log, \
such as info or cachefs=debug.";

/// The flags of `cachefs mount`.
#[derive(Debug, Clone, clap::Args)]
pub struct MountArgs {
    /// An empty directory to mount on
    pub mountpoint: PathBuf,
    /// The shared store's directory
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// A directory on this host's own disk, for the local cache
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// The most that the local cache may take: bytes, or 50G (10^9), 50Gi (2^30) [default: 80% of what the disk has free, 20G at most]
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<Size>,
    /// The coordinator's address, which is told what this host uses, and what containers read when they start
    #[arg(long, value_name = "URL")]
    pub coordinator: Option<Address>,
    /// File with the token to show to the coordinator; without it CACHEFS_TOKEN is the token itself
    #[arg(long, env = "CACHEFS_TOKEN_FILE", value_name = "FILE", value_parser = path())]
    pub token_file: Option<PathBuf>,
    /// PEM file with the authority of the coordinator's certificate, or the certificate itself
    #[arg(long, env = "CACHEFS_CA_CERTIFICATE", value_name = "FILE", value_parser = path())]
    pub ca_certificate: Option<PathBuf>,
    /// What to call this host when talking to the coordinator [default: its hostname]
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,
    /// How long a read waits for the shared store before it fails [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub read_timeout: Option<Patience>,
    /// Whether to bring more into the local cache than was asked for [default: on]
    #[arg(long, value_name = "on|off", value_enum)]
    pub prefetch: Option<Prefetch>,
    /// How opens of files are answered [default: auto]
    #[arg(long, value_name = "MODE")]
    pub open: Option<OpenChoice>,
    /// What engines are given as an image's tree [default: auto]
    #[arg(long, value_name = "KIND")]
    pub tree: Option<TreeChoice>,
    /// A TOML file with the same names as these flags; flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Stay in the foreground and log to stderr
    #[arg(long)]
    pub foreground: bool,
    /// Started by `cachefs mount` itself: leave the terminal and tell stdout how it went
    #[arg(long, hide = true)]
    pub detached: bool,
    /// Started by the keeper of a mount: serve it
    #[arg(long, hide = true)]
    pub worker: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileConfig {
    store: Option<PathBuf>,
    cache: Option<PathBuf>,
    cache_size: Option<Size>,
    coordinator: Option<String>,
    token_file: Option<PathBuf>,
    ca_certificate: Option<PathBuf>,
    host_name: Option<String>,
    read_timeout: Option<Patience>,
    prefetch: Option<Prefetch>,
    open: Option<OpenChoice>,
    tree: Option<TreeChoice>,
}

/// The checked configuration of a mount.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to mount.
    pub mountpoint: PathBuf,
    /// The shared store.
    pub store: PathBuf,
    /// The local cache.
    pub cache: PathBuf,
    /// How large the local cache may become.
    pub limit: Limit,
    /// The coordinator's address.
    pub coordinator: Option<Address>,
    /// The token to show to the coordinator, and the authority to trust.
    pub credentials: Credentials,
    /// The name of this host, for the coordinator.
    pub host_name: String,
    /// How long reads wait for the shared store.
    pub read_timeout: Duration,
    /// Whether to prefetch.
    pub prefetch: Prefetch,
    /// How opens of files are answered.
    pub open: OpenMode,
    /// What engines are given as an image's tree.
    pub tree: TreeChoice,
    /// How many FUSE threads to run.
    pub fuse_threads: usize,
}

fn read_file(path: &Path) -> Result<FileConfig, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
    let first_line = |text: String| text.trim().lines().last().unwrap_or_default().to_owned();
    toml::from_str(&text).map_err(|e| Error::Malformed { path: path.to_owned(), why: first_line(e.to_string()) })
}

/// Parses a path, which may be empty: clap's own parser refuses a variable that is set to nothing.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// The path, unless it is empty: a variable that is set to nothing counts as not set.
fn said(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.as_os_str().is_empty())
}

/// The absolute path: paths must survive the daemon's change of directory.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

impl Config {
    /// Checks flags and file.
    pub fn new(args: MountArgs) -> Result<Config, Error> {
        let file = args.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Config {
            mountpoint: args.mountpoint,
            store: absolute(args.store.or(file.store).ok_or(Error::Lacking("store"))?),
            cache: absolute(args.cache.or(file.cache).ok_or(Error::Lacking("cache"))?),
            limit: args.cache_size.or(file.cache_size).map_or(Limit::Automatic, |size| Limit::Bytes(size.0)),
            coordinator: match (args.coordinator, file.coordinator) {
                (Some(address), _) => Some(address),
                (None, text) => text.map(|text| text.parse()).transpose()?,
            },
            credentials: Credentials::new(
                said(args.token_file).or(file.token_file).map(absolute).as_deref(),
                token()?,
                said(args.ca_certificate).or(file.ca_certificate).map(absolute).as_deref(),
            ),
            host_name: args.host_name.or(file.host_name).unwrap_or_else(host_name),
            read_timeout: args.read_timeout.or(file.read_timeout).map_or(READ_TIMEOUT, |span| span.0),
            prefetch: args.prefetch.or(file.prefetch).unwrap_or(Prefetch::On),
            open: args.open.or(file.open).unwrap_or(OpenChoice::Auto).into(),
            tree: args.tree.or(file.tree).unwrap_or(TreeChoice::Auto),
            fuse_threads: (2 * processors).clamp(4, 16),
        })
    }
}

/// The token in the environment. It is never a flag: every user could see it in the list of processes.
fn token() -> Result<Option<coordinator_api::credentials::Token>, BadToken> {
    let given = std::env::var("CACHEFS_TOKEN").ok().filter(|text| !text.is_empty());
    given.map(|text| text.parse()).transpose()
}

/// This machine's own name.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// What to log: `CACHEFS_LOG`, in the syntax of the tracing crate, or `info`.
pub fn log_filter() -> String {
    let said = std::env::var("CACHEFS_LOG").ok().filter(|filter| !filter.is_empty());
    said.unwrap_or_else(|| "info".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> MountArgs {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: MountArgs,
        }
        <Line as clap::Parser>::parse_from([&["mount"], words].concat()).args
    }

    #[test]
    fn sizes_and_durations_are_those_of_the_coordinator() {
        let config = |words: &[&str]| Config::new(args(&[&["/m", "--store", "/s", "--cache", "/c"], words].concat()));
        assert_eq!(config(&["--cache-size", "20G"]).unwrap().limit, Limit::Bytes(20_000_000_000));
        assert_eq!(config(&["--cache-size", "20Gi"]).unwrap().limit, Limit::Bytes(20 << 30));
        assert_eq!(config(&["--read-timeout", "1m30s"]).unwrap().read_timeout, Duration::from_secs(90));
        for bad in ["", "5", "0s", "2d", "25h", "s"] {
            assert!(bad.parse::<Patience>().is_err(), "{bad}");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_mistakes_have_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let path = file.to_str().unwrap();
        std::fs::write(&file, "store = '/s'\ncache = '/c'\ncache-size = '1G'\nread-timeout = '2s'\n").unwrap();
        let config = Config::new(args(&["/m", "--config", path, "--cache-size", "2G"])).unwrap();
        assert_eq!((config.store, config.limit), ("/s".into(), Limit::Bytes(2_000_000_000)));
        assert_eq!(config.read_timeout, Duration::from_secs(2));
        let text = "store = '/s'\ncache = '/c'\ncoordinator = 'https://h'\ntoken-file = '/t'\nca-certificate = '/a'\nhost-name = 'n'\n";
        std::fs::write(&file, text).unwrap();
        let config = Config::new(args(&["/m", "--config", path, "--token-file", "/u"])).unwrap();
        assert_eq!(config.credentials, Credentials::new(Some(Path::new("/u")), None, Some(Path::new("/a"))));
        assert_eq!((config.coordinator, config.host_name), ("https://h".parse().ok(), "n".to_owned()));
        std::fs::write(&file, "stoer = '/s'\n").unwrap();
        let error = Config::new(args(&["/m", "--config", path])).unwrap_err().to_string();
        assert!(error.contains("c.toml is not valid: unknown field `stoer`"), "{error}");
        let error = Config::new(args(&["/m", "--store", "/s"])).unwrap_err().to_string();
        assert_eq!(error, "cache is needed: give --cache, or cache in the file of --config");
    }
}
