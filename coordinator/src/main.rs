//! `cachefs-coordinator`: reads the command line and the configuration, then serves.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use coordinator::app::config::{Cli, Command, Config, ConfigError, LogFormat, ServeArgs};
use coordinator::app::private_directory;
use coordinator_api::printable::{LogForm, PrintableLog, printable};
use coordinator_api::report::{self, Form};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

const PROGRAM: &str = "cachefs-coordinator";

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
            // A reader that stops early (`| head`) is no failure.
            let _ = std::io::stdout().write_all(&script);
            ExitCode::SUCCESS
        }
        Command::Man { directory } => match clap_mangen::generate_to(Cli::command(), &directory) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                report::fail(
                    PROGRAM,
                    Form::Text,
                    "failed",
                    &format!("cannot write into {}: {error}", directory.display()),
                );
                ExitCode::from(report::EXIT_FAILED)
            }
        },
    }
}

fn serve(args: &ServeArgs) -> ExitCode {
    let Err(error) = start(args) else { return ExitCode::SUCCESS };
    // If the log is JSON, its last line is JSON, too.
    let form = match args.log_format {
        LogFormat::Text => Form::Text,
        LogFormat::Json => Form::Json,
    };
    let (code, exit) = match error.downcast_ref::<ConfigError>() {
        Some(ConfigError::Missing(_)) => ("usage", report::EXIT_USAGE),
        _ => ("failed", report::EXIT_FAILED),
    };
    report::fail(PROGRAM, form, code, &printable(&error.to_string()));
    ExitCode::from(exit)
}

fn start(args: &ServeArgs) -> anyhow::Result<()> {
    init_log(args)?;
    private_directory::keep_to_ourselves();
    // One TLS provider for the whole process, installed before anything needs it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = Config::load(args)?;
    if let Some((point, nth)) = config.crash_at {
        tracing::warn!("this process will die at {}, time {nth}", point.name());
        store::crash::arm(point, nth);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let stop = CancellationToken::new();
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        ignore_signals()?;
        tokio::spawn({
            let stop = stop.clone();
            async move {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                tracing::info!("stopping");
                stop.cancel();
            }
        });
        anyhow::Ok(coordinator::app::serve::run(config, stop).await?)
    });
    // Threads that hang on a shared disk must not keep a stopped coordinator alive.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result
}

/// Keeps SIGHUP, SIGUSR1 and SIGUSR2, which make other daemons reload or print their state, from ending the process. Each is
/// logged.
fn ignore_signals() -> std::io::Result<()> {
    let kinds = [
        (SignalKind::hangup(), "SIGHUP"),
        (SignalKind::user_defined1(), "SIGUSR1"),
        (SignalKind::user_defined2(), "SIGUSR2"),
    ];
    for (kind, name) in kinds {
        let mut received = signal(kind)?;
        tokio::spawn(async move {
            while received.recv().await.is_some() {
                tracing::info!("{name} is ignored: a changed configuration is read at the next start");
            }
        });
    }
    Ok(())
}

fn init_log(args: &ServeArgs) -> anyhow::Result<()> {
    // A variable that is set to the empty string counts as unset.
    let wanted = if args.log.is_empty() { "info" } else { &args.log };
    let filter = EnvFilter::try_new(wanted).map_err(|error| {
        anyhow::anyhow!("--log {} is not a log filter: {error}; try info or coordinator=debug", args.log)
    })?;
    let form = match args.log_format {
        LogFormat::Text => LogForm::Text,
        LogFormat::Json => LogForm::Json,
    };
    // Messages contain text from registries and images: none of it may forge a line of the log.
    let writer = move || PrintableLog::new(std::io::stderr(), form);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    match form {
        LogForm::Text => log.with_ansi(is_coloured()).with_target(false).init(),
        LogForm::Json => log.json().init(),
    }
    Ok(())
}

/// Colours only on a terminal, and only if `NO_COLOR` is not set (<https://no-color.org>).
fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
