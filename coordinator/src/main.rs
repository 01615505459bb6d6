//! `cachefs-coordinator`: parse, build, run.

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
            // A reader that has seen enough is no failure.
            let _ = std::io::stdout().write_all(&script);
            ExitCode::SUCCESS
        }
    }
}

fn serve(args: &ServeArgs) -> ExitCode {
    let Err(error) = start(args) else { return ExitCode::SUCCESS };
    // Whoever reads the log as JSON reads its end so, too.
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
    // One TLS provider for the whole process, chosen before anything can ask for it.
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

/// Has the signals that other daemons reload upon, or are asked for their state by, end nothing here; each is told of in the log.
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
    // A variable that is set to nothing is not set.
    let wanted = if args.log.is_empty() { "info" } else { &args.log };
    let filter = EnvFilter::try_new(wanted).map_err(|error| {
        anyhow::anyhow!("--log {} is not a log filter: {error}; try info or coordinator=debug", args.log)
    })?;
    let form = match args.log_format {
        LogFormat::Text => LogForm::Text,
        LogFormat::Json => LogForm::Json,
    };
    // What registries and images say gets into messages: no line of the log is theirs.
    let writer = move || PrintableLog::new(std::io::stderr(), form);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    match form {
        LogForm::Text => log.with_ansi(is_coloured()).with_target(false).init(),
        LogForm::Json => log.json().init(),
    }
    Ok(())
}

/// Colours are for terminals, and for people who have not said <https://no-color.org>.
fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
