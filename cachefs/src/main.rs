//! `cachefs`: the host's command line. Parse, call the library, say what went wrong.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use cachefs::config::{self, Config, MountArgs};
use cachefs::{daemon, docker};
use coordinator_api::printable::{LogForm, PrintableLog, printable_lines};

mod inspect;
mod launch;
mod starts;

/// Runs containers straight from a shared store of image layers.
#[derive(Parser)]
#[command(name = "cachefs", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount the shared store on a directory
    Mount(MountArgs),
    /// Unmount it
    Unmount {
        /// Where it is mounted
        mountpoint: PathBuf,
    },
    /// Show the state of the daemons on this host
    Status(inspect::StatusArgs),
    /// Look at or clean up a local cache
    Cache(inspect::CacheArgs),
    /// Bring all of an image into the local cache before it is needed
    Prefetch(starts::PrefetchArgs),
    /// Show how the last starts of images went on this host, and what they waited for
    Why(starts::WhyArgs),
    /// Fill Docker's data-root from the mount
    DataRoot(docker::data_root::Args),
    /// Print a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// A mistake of the caller, or a failure.
enum Ending {
    Usage(String),
    Failure(String),
}

impl<E: std::error::Error> From<E> for Ending {
    fn from(error: E) -> Ending {
        Ending::Failure(error.to_string())
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Ending::Usage(text)) => {
            eprintln!("cachefs: {}", printable_lines(&text));
            ExitCode::from(2)
        }
        Err(Ending::Failure(text)) => {
            eprintln!("cachefs: {}", printable_lines(&text));
            ExitCode::FAILURE
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
        Command::DataRoot(args) => Ok(docker::data_root::run(args)?),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "cachefs", &mut std::io::stdout());
            Ok(())
        }
    }
}

fn mount(args: MountArgs) -> Result<(), Ending> {
    cachefs::private::close_umask();
    let (foreground, detached) = (args.foreground, args.detached);
    let config = Config::new(args.clone()).map_err(|error| match error {
        config::Error::Lacking(_) => Ending::Usage(error.to_string()),
        error => error.into(),
    })?;
    match (foreground, detached) {
        (false, _) => launch::in_background(&config, &args),
        (true, true) => launch::detached(&config),
        (true, false) => {
            start_log();
            Ok(daemon::run(&config, || _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]))?)
        }
    }
}

/// Logs to stderr.
fn start_log() {
    let filter = format!("{},{}", cachefs::fuse::LOG_FILTER, config::log_filter());
    let filter = tracing_subscriber::EnvFilter::new(filter);
    // Names in messages come from images: no line of the log is theirs.
    let writer = || PrintableLog::new(std::io::stderr(), LogForm::Text);
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false).init();
}
