//! `cachefs-coordinator`: parse, build, run.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use coordinator::config::{Cli, Command, Config, LogFormat, ServeArgs};
use coordinator::{private_directory, serve};
use coordinator_api::printable::{LogForm, PrintableLog, printable};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let Cli { command: Command::Serve(args) } = Cli::parse();
    match start(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cachefs-coordinator: {}", printable(&error.to_string()));
            ExitCode::FAILURE
        }
    }
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
        tokio::spawn({
            let stop = stop.clone();
            async move {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                tracing::info!("stopping");
                stop.cancel();
            }
        });
        anyhow::Ok(serve::run(config, stop).await?)
    });
    // Threads that hang on a shared disk must not keep a stopped coordinator alive.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result
}

fn init_log(args: &ServeArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).map_err(|error| {
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
        LogForm::Text => log.with_ansi(std::io::stderr().is_terminal()).with_target(false).init(),
        LogForm::Json => log.json().init(),
    }
    Ok(())
}
