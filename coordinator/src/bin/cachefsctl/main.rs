//! `cachefsctl`: the administrator's command line. It talks only to the coordinator's API.
//!
//! - `output`: JSON, tables, sizes and times for people. `reader`: whether the output still has a reader. `interrupt`: SIGINT and
//!   SIGTERM. `patience`: retries while the coordinator is away. `progress`: bars while jobs run. `document`: the YAML that
//!   people write.
//! - `pull`, `archive` (load, export), `images` (images, image, remove, wait), `pins`, `gc`, `jobs`, `profile`, `events`,
//!   `hosts`, `token`, `schedule` (schedule, registries), `apply` (apply, diff), `fsck`, `status`, `version`: one file per group
//!   of commands.
//!
//! Results go to stdout, everything else to stderr, as described in `coordinator_api::report`, which also has the exit codes.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{CommandFactory, Parser, Subcommand};
use coordinator_api::address::BadAddress;
use coordinator_api::report::{self, Form};
use coordinator_api::{Address, Client, Credentials};

mod apply;
mod archive;
mod document;
mod events;
mod fsck;
mod gc;
mod hosts;
mod images;
mod interrupt;
mod jobs;
mod output;
mod patience;
mod pins;
mod profile;
mod progress;
mod pull;
mod reader;
mod schedule;
mod status;
mod token;
mod version;

use interrupt::Interrupted;
use output::{Answer, Output, PROGRAM};

/// Bring images into the shared store and look after them.
#[derive(Parser)]
#[command(name = "cachefsctl", version, subcommand_required = true, after_help = report::EXIT_CODES)]
struct Cli {
    /// Where the coordinator listens: unix:PATH, https://HOST:PORT, or http://HOST:PORT on this machine
    #[arg(long, global = true, env = "CACHEFS_SERVER", default_value_t, value_name = "URL", value_parser = address)]
    server: Address,
    /// File with the token to show over the network; without it CACHEFS_TOKEN is the token itself
    #[arg(long, global = true, env = "CACHEFS_TOKEN_FILE", value_name = "FILE", value_parser = path())]
    token_file: Option<PathBuf>,
    /// PEM file with the authority of the coordinator's certificate, or the certificate itself
    #[arg(long, global = true, env = "CACHEFS_CA_CERTIFICATE", value_name = "FILE", value_parser = path())]
    ca_certificate: Option<PathBuf>,
    /// Print one JSON document on stdout instead of text (events --follow and jobs --watch: one object a line); on stderr errors,
    /// warnings and progress as one object a line
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pull images from their registries into the store
    Pull(pull::Pull),
    /// Load a docker save tar or an OCI layout in a tar (- reads standard input)
    Load(archive::Load),
    /// Write an image as a tar that docker load accepts (- writes standard output)
    Export(archive::Export),
    /// List the images
    #[command(visible_alias = "ls")]
    Images,
    /// Show one image: layers, config, and what its tag pointed to before
    Image(images::Name),
    /// Take images out of the catalogue (their layers stay until they are collected)
    #[command(visible_alias = "rm")]
    Remove(images::Removal),
    /// Keep an image's name whatever the rules and the quota say
    Pin(pins::Name),
    /// Let the rules and the quota decide about an image's name again
    Unpin(pins::Name),
    /// List the pinned names
    Pins,
    /// Remove what nothing needs any more
    Gc(gc::Collect),
    /// Show what is kept and for how long
    Retention,
    /// Wait until an image is published
    Wait(images::Wait),
    /// List pull jobs, newest first
    Jobs(jobs::List),
    /// Show one pull job
    Job(jobs::Id),
    /// End a pull job
    Cancel(jobs::Id),
    /// Start a pull job again that failed or was cancelled
    Retry(jobs::Id),
    /// Standing orders: by time, on push, when tags move, ready by a deadline
    #[command(subcommand)]
    Schedule(schedule::Command),
    /// Bring schedules and limits from a YAML file about; shows the differences first
    Apply(apply::Apply),
    /// Show what apply would change; exit code 1 if anything, 3 if that cannot be found out
    Diff(apply::Diff),
    /// Show how the registries stand: breaker, rate limit, speed
    Registries,
    /// Show what starts of an image read, as far as hosts have traced it
    Profile(profile::Show),
    /// Check the store, and repair it
    Fsck(fsck::Check),
    /// Show what happened, and with --follow what happens
    Events(events::Events),
    /// List the hosts that mount the store
    Hosts,
    /// Make, list and revoke tokens
    #[command(subcommand)]
    Token(token::Token),
    /// Show the coordinator's condition
    Status,
    /// Show the versions of this program and of the coordinator
    Version,
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

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misspelt(&error),
    };
    let output = if cli.json { Output::Json } else { Output::Text };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(output, &error.into(), cli.command.answers()),
    };
    let answers = cli.command.answers();
    match runtime.block_on(run(cli, output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(output, &error, answers),
    }
}

impl Command {
    /// What exit code 1 means for this command.
    fn answers(&self) -> One {
        match self {
            Command::Diff(_) => One::Answer,
            Command::Fsck(check) if check.asks() => One::Answer,
            _ => One::Failure,
        }
    }
}

/// What exit code 1 of a command means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum One {
    /// The command found something wrong. If it could not find out, it exits with another code.
    Answer,
    /// The command failed.
    Failure,
}

/// Parses the coordinator's address. A variable that is set to the empty string counts as unset.
fn address(text: &str) -> Result<Address, BadAddress> {
    if text.is_empty() { Ok(Address::default()) } else { text.parse() }
}

/// Parses a path; an environment variable that is set to the empty string gives an empty path.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// Handles a command line that cannot be parsed, or a request for help.
fn misspelt(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || Form::of(std::env::args_os()) == Form::Text {
        error.exit();
    }
    let text = error.render().to_string();
    let words = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    report::fail(PROGRAM, Form::Json, "usage", words);
    ExitCode::from(report::EXIT_USAGE)
}

/// Reports an error on stderr and returns the exit code.
fn failed(output: Output, error: &anyhow::Error, one: One) -> ExitCode {
    // A reader that stops early is no failure (`cachefsctl events --follow | head`).
    let broken_pipe = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if error.downcast_ref::<std::io::Error>().is_some_and(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    output::complain(output, error);
    let code = match error.downcast_ref::<Interrupted>() {
        Some(interrupted) => interrupted.exit,
        None if one == One::Answer && !error.is::<Answer>() => report::EXIT_UNANSWERED,
        None => report::EXIT_FAILED,
    };
    ExitCode::from(code)
}

/// The token to present and the certificates to trust. A token is never a flag: every user could see it in the list of processes.
fn credentials(token_file: Option<PathBuf>, ca_certificate: Option<PathBuf>) -> anyhow::Result<Credentials> {
    // A variable that is set to the empty string counts as unset.
    let said = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
    let (token_file, ca_certificate) = (said(token_file), said(ca_certificate));
    let given = std::env::var("CACHEFS_TOKEN").ok().filter(|text| !text.is_empty());
    let given =
        given.map(|text| text.parse().map_err(|error| anyhow::anyhow!("CACHEFS_TOKEN cannot be used: {error}")));
    Ok(Credentials::new(token_file.as_deref(), given.transpose()?, ca_certificate.as_deref()))
}

async fn run(cli: Cli, output: Output) -> anyhow::Result<()> {
    let client = Client::new(cli.server, &credentials(cli.token_file, cli.ca_certificate)?)?;
    match cli.command {
        Command::Pull(arguments) => pull::pull(&client, output, arguments).await,
        Command::Load(arguments) => archive::load(&client, output, arguments).await,
        Command::Export(arguments) => archive::export(&client, output, arguments).await,
        Command::Images => images::list(&client, output).await,
        Command::Image(name) => images::show(&client, output, &name).await,
        Command::Remove(names) => images::remove(&client, output, &names).await,
        Command::Pin(name) => pins::pin(&client, output, &name).await,
        Command::Unpin(name) => pins::unpin(&client, output, &name).await,
        Command::Pins => pins::list(&client, output).await,
        Command::Gc(arguments) => gc::collect(&client, output, &arguments).await,
        Command::Retention => gc::retention(&client, output).await,
        Command::Wait(arguments) => images::wait(&client, output, &arguments).await,
        Command::Jobs(arguments) => jobs::list(&client, output, &arguments).await,
        Command::Job(id) => jobs::show(&client, output, &id).await,
        Command::Cancel(id) => jobs::cancel(&client, output, &id).await,
        Command::Retry(id) => jobs::retry(&client, output, &id).await,
        Command::Schedule(command) => schedule::run(&client, output, command).await,
        Command::Apply(arguments) => apply::apply(&client, output, &arguments).await,
        Command::Diff(arguments) => apply::diff(&client, output, &arguments).await,
        Command::Registries => schedule::registries(&client, output).await,
        Command::Profile(arguments) => profile::show(&client, output, &arguments).await,
        Command::Fsck(arguments) => fsck::fsck(&client, output, arguments).await,
        Command::Events(arguments) => events::show(&client, output, &arguments).await,
        Command::Hosts => hosts::list(&client, output).await,
        Command::Token(command) => token::run(&client, output, command).await,
        Command::Status => status::show(&client, output).await,
        Command::Version => version::show(&client, output).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cachefsctl", &mut script);
            Ok(std::io::stdout().write_all(&script)?)
        }
        Command::Man { directory } => Ok(clap_mangen::generate_to(Cli::command(), directory)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
