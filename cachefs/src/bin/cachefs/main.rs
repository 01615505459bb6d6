//! `cachefs`: the host's command line. Parse, call the library, say what went wrong.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use cachefs::docker;
use cachefs::docker::data_root::Health;
use cachefs::docker::image_store::ImageStoreArgs;
use cachefs::docker::snapshotter::SnapshotterArgs;
use cachefs::mount::config::{self, Config, MountArgs};
use coordinator_api::printable::{LogForm, PrintableLog};
use coordinator_api::report::{self, Form};
use tracing_subscriber::EnvFilter;

mod inspect;
mod launch;
mod leftover;
mod starts;

/// Runs containers straight from a shared store of image layers.
#[derive(Parser)]
#[command(name = "cachefs", version, propagate_version = true, after_help = report::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount the shared store on a directory
    #[command(after_help = config::MOUNT_EXAMPLE)]
    Mount(MountArgs),
    /// Unmount the shared store and end its daemon; exit code 1 if containers still use it, and keep the daemon
    #[command(visible_alias = "umount")]
    Unmount {
        /// Where it is mounted
        mountpoint: PathBuf,
    },
    /// Show the state of the daemons on this host; exit code 1 if nothing is mounted or a daemon does not answer
    Status(inspect::StatusArgs),
    /// Look at or clean up a local cache
    Cache(inspect::CacheArgs),
    /// Bring all of an image into the local cache before it is needed
    Prefetch(starts::PrefetchArgs),
    /// Show how the last starts of images went on this host, and what they waited for
    Why(starts::WhyArgs),
    /// Fill Docker's data-root from the mount
    DataRoot(docker::data_root::Args),
    /// Keep an image store for Podman, Buildah and CRI-O
    #[command(after_help = docker::image_store::EXAMPLE)]
    ImageStore(ImageStoreArgs),
    /// Serve containerd's snapshots from the mount
    #[command(after_help = docker::snapshotter::EXAMPLE)]
    Snapshotter(SnapshotterArgs),
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

/// Why a command does not exit with 0: a mistake of the caller, the answer that something is not as it should be, or a
/// failure.
enum Ending {
    Usage(String),
    Answer(String),
    Failure(String),
}

impl<E: std::error::Error> From<E> for Ending {
    fn from(error: E) -> Ending {
        Ending::Failure(error.to_string())
    }
}

const PROGRAM: &str = "cachefs";

fn main() -> ExitCode {
    let form = Form::of(std::env::args_os());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && form == Form::Json => {
            let text = error.render().to_string();
            let words = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            report::fail(PROGRAM, form, "usage", words);
            return ExitCode::from(report::EXIT_USAGE);
        }
        Err(error) => error.exit(),
    };
    let unanswered = if cli.command.asks() { report::EXIT_UNANSWERED } else { report::EXIT_FAILED };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Ending::Usage(text)) => {
            report::fail(PROGRAM, form, "usage", &text);
            ExitCode::from(report::EXIT_USAGE)
        }
        Err(Ending::Answer(text)) => {
            report::fail(PROGRAM, form, "failed", &text);
            ExitCode::from(report::EXIT_FAILED)
        }
        Err(Ending::Failure(text)) => {
            report::fail(PROGRAM, form, "failed", &text);
            ExitCode::from(unanswered)
        }
    }
}

impl Command {
    /// Whether exit code 1 is an answer of this command. Then a failure to find the answer has another exit code.
    fn asks(&self) -> bool {
        match self {
            Command::Status(_) => true,
            Command::Cache(args) => args.asks(),
            Command::DataRoot(args) => args.asks(),
            _ => false,
        }
    }
}

fn run(command: Command) -> Result<(), Ending> {
    match command {
        Command::Mount(args) => mount(args),
        Command::Unmount { mountpoint } => launch::unmount(&mountpoint),
        Command::Status(args) => inspect::status(&args),
        Command::Cache(args) => inspect::cache(&args),
        Command::Prefetch(args) => starts::prefetch(&args),
        Command::Why(args) => starts::why(&args),
        Command::DataRoot(args) => match docker::data_root::run(args)? {
            Health::Good => Ok(()),
            Health::Wanting(why) => Err(Ending::Answer(why)),
        },
        Command::ImageStore(args) => {
            start_log(log_filter()?);
            Ok(docker::image_store::run(&args, || _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]))?)
        }
        Command::Snapshotter(args) => {
            start_log(log_filter()?);
            Ok(docker::snapshotter::run(&args, || _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]))?)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
            inspect::write(&script)
        }
        Command::Man { directory } => Ok(clap_mangen::generate_to(Cli::command(), directory)?),
    }
}

fn mount(args: MountArgs) -> Result<(), Ending> {
    cachefs::os::private_files::close_umask();
    let config = Config::new(args.clone()).map_err(|error| match error {
        config::Error::Lacking(_) => Ending::Usage(error.to_string()),
        error => error.into(),
    })?;
    let filter = log_filter()?;
    let ready = || _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    match args {
        MountArgs { worker: true, .. } => launch::worker(&config, filter),
        MountArgs { foreground: false, .. } => launch::in_background(&config),
        MountArgs { detached: true, .. } => launch::detached(&config, filter),
        _ => launch::in_foreground(&config, filter, ready),
    }
}

/// The log filter: the FUSE adapter's own, then that of `CACHEFS_LOG`.
fn log_filter() -> Result<EnvFilter, Ending> {
    let said = config::log_filter();
    let filter = EnvFilter::try_new(format!("{},{said}", cachefs::mount::fuse::LOG_FILTER));
    filter.map_err(|error| {
        Ending::Usage(format!("CACHEFS_LOG={said} is not a log filter: {error}; try info or cachefs=debug"))
    })
}

/// Starts logging to stderr.
fn start_log(filter: EnvFilter) {
    // Names in messages come from images: they are escaped, so that they cannot forge lines of the log.
    let writer = || PrintableLog::new(std::io::stderr(), LogForm::Text);
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false).init();
}
