//! `cachefs why` and `cachefs prefetch`: how starts of images went on this host, and fetching an image before it
//! starts.

use std::path::PathBuf;

use cachefs::mount::control_socket::{self, Advance, NamedStart, Request};
use cachefs::mount::mountpoint;
use clap::Args;
use coordinator_api::printable::printable;
use coordinator_api::quantity::format_size;
use indicatif::{ProgressBar, ProgressStyle};

use crate::Ending;
use crate::inspect::{cache_of, mounts, print, print_json};

/// How many of the files that a start waited for are shown.
const WAITS: usize = 10;

/// Arguments of `cachefs why`.
#[derive(Args)]
pub(crate) struct WhyArgs {
    /// Only starts of this image
    image: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Only the daemon of this mount [default: that of the one mount on this host]
    #[arg(long, value_name = "MOUNTPOINT")]
    mount: Option<PathBuf>,
}

/// Arguments of `cachefs prefetch`.
#[derive(Args)]
pub(crate) struct PrefetchArgs {
    /// The image, as cachefsctl images shows it
    image: String,
    /// Into the local cache of this mount [default: that of the one mount on this host]
    #[arg(long, value_name = "MOUNTPOINT")]
    mount: Option<PathBuf>,
}

/// The cache directory of the given mount, or of the only one.
fn cache(mount: Option<&PathBuf>) -> Result<PathBuf, Ending> {
    let mountpoint = match (mount, &mounts()[..]) {
        (Some(path), _) => mountpoint::ours(path)?,
        (None, [only]) => only.clone(),
        (None, []) => return Err(Ending::Failure("nothing is mounted: start with cachefs mount".into())),
        (None, _) => return Err(Ending::Usage("there are several mounts: say which with --mount MOUNTPOINT".into())),
    };
    let dead = || format!("the daemon of {} does not answer: mount again to recover it", mountpoint.display());
    cache_of(&mountpoint).ok_or_else(|| Ending::Failure(dead()))
}

/// Shows the last starts.
pub(crate) fn why(args: &WhyArgs) -> Result<(), Ending> {
    let mut starts: Vec<NamedStart> = control_socket::ask(&cache(args.mount.as_ref())?, &Request::Starts)?;
    if let Some(wanted) = &args.image {
        let wanted: store::image::ImageRef = wanted.parse()?;
        let is_wanted = |name: &String| name.parse::<store::image::ImageRef>().is_ok_and(|name| name == wanted);
        starts.retain(|start| start.images.iter().any(is_wanted));
    }
    if args.json {
        print_json(&serde_json::json!({ "starts": starts }))?;
    }
    match (&args.image, starts.is_empty()) {
        (Some(image), true) => Err(Ending::Failure(format!(
            "no start of image {image} was recorded: a start is recorded when a daemon first looks into an image"
        ))),
        _ if args.json => Ok(()),
        (None, true) => print("No start was recorded: a start is recorded when a daemon first looks into an image.\n"),
        (_, false) => print(&starts.iter().map(describe).collect::<Vec<_>>().join("\n")),
    }
}

/// `part` of `whole` in percent.
fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        _ => format!("{:.0}%", 100.0 * part as f64 / whole as f64),
    }
}

fn describe(named: &NamedStart) -> String {
    let NamedStart { images, start } = named;
    let outcome = &start.outcome;
    let name = images.first().map_or_else(|| format!("chain {}", start.chain), |name| printable(name).into_owned());
    let profile = match start.profile {
        Some(_) => format!(
            "  profile      {} came before they were asked for; {} of that was used (precision), which is {} of what was read (recall)\n",
            format_size(outcome.prefetched_bytes),
            percent(outcome.prefetched_used_bytes, outcome.prefetched_bytes),
            percent(outcome.prefetched_used_bytes, outcome.touched_bytes),
        ),
        None => "  profile      none was there yet\n".to_owned(),
    };
    let mut text = format!(
        "{name}\n  read         {} in {} pieces within {} ms\n{profile}  waited       {} ms in all for the shared disk, for {}\n",
        format_size(outcome.touched_bytes),
        start.pieces,
        start.millis,
        start.waited_millis,
        format_size(outcome.missed_bytes),
    );
    for wait in start.waits.iter().take(WAITS) {
        text.push_str(&format!("    {:>6} ms  {} reads  {}\n", wait.millis, wait.reads, printable(&wait.path)));
    }
    text
}

/// Fetches an image into the local cache, with a progress bar.
pub(crate) fn prefetch(args: &PrefetchArgs) -> Result<(), Ending> {
    let request = Request::Prefetch { image: args.image.clone() };
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{wide_bar}] {percent}% {eta}") {
        bar.set_style(style);
    }
    bar.set_message(args.image.clone());
    for advance in control_socket::follow::<Advance>(&cache(args.mount.as_ref())?, &request)? {
        let advance = advance?;
        if let Some(why) = advance.error {
            bar.abandon();
            return Err(Ending::Failure(why));
        }
        bar.set_length(advance.chunks);
        bar.set_position(advance.done.min(advance.chunks));
        if advance.is_over {
            bar.finish_and_clear();
            if advance.lacking > 0 {
                return Err(Ending::Failure(format!(
                    "{} of {} chunks of {} are not in the local cache: it has no room for them (see --cache-size), or they could not be \
                     read (see the daemon's log)",
                    advance.lacking, advance.chunks, args.image
                )));
            }
            return print(&format!("{} is in the local cache\n", args.image));
        }
    }
    bar.abandon();
    Err(Ending::Failure(format!("the daemon ended before {} was in the local cache: try again", args.image)))
}
