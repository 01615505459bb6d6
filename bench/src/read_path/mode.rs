//! Ways to mount that a run compares.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// The name of the side with the unpacked trees.
pub(super) const NATIVE: &str = "native";

/// A way to mount: its name, the program, and arguments of `cachefs mount`.
#[derive(Debug, Clone)]
pub(crate) struct Mode {
    pub(super) name: String,
    /// Another build's `cachefs`.
    pub(super) program: Option<PathBuf>,
    pub(super) arguments: Vec<String>,
}

impl FromStr for Mode {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Mode> {
        let (name, arguments) =
            text.split_once(':').with_context(|| format!("{text:?} is no mode: write NAME[=PROGRAM]:ARGUMENTS"))?;
        let (name, program) = name.split_once('=').map_or((name, None), |(name, path)| (name, Some(path.into())));
        if name.is_empty() || name.contains('/') || name == NATIVE {
            bail!("{name:?} cannot be a mode's name: it names a directory, and {NATIVE} is taken");
        }
        Ok(Mode {
            name: name.to_owned(),
            program,
            arguments: arguments.split_whitespace().map(str::to_owned).collect(),
        })
    }
}
