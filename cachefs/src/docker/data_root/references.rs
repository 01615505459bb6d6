//! `repositories.json`: names and tags of images, as dockerd keeps them.
//!
//! `{"Repositories": {"alpine": {"alpine:3.20": "sha256:<image ID>", "alpine@sha256:<manifest>": "sha256:<image ID>"}}}`, names in
//! Docker's familiar form.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use store::Digest;

use super::error::{Error, Result};
use super::root::Root;
use crate::docker::files;

/// The content of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct References {
    #[serde(rename = "Repositories", default)]
    repositories: BTreeMap<String, BTreeMap<String, Digest>>,
}

/// `alpine:3.20` and `alpine@sha256:...` -> `alpine`.
fn repository(reference: &str) -> &str {
    let name = reference.split_once('@').map_or(reference, |(name, _)| name);
    let last_slash = name.rfind('/').map_or(0, |at| at + 1);
    name[last_slash..].rfind(':').map_or(name, |colon| &name[..last_slash + colon])
}

impl References {
    /// Reads the file. If there is none, there are no names.
    pub(super) fn read(root: &Root) -> Result<References> {
        let path = root.repositories();
        match files::read_text(&path)?.filter(|text| !text.is_empty()) {
            None => Ok(References::default()),
            Some(text) => serde_json::from_str(&text).map_err(|e| Error::Damaged { path, why: e.to_string() }),
        }
    }

    /// Writes the file, durably.
    pub(super) fn write(&self, root: &Root) -> Result<()> {
        let path = root.repositories();
        let bytes = serde_json::to_vec(self).map_err(|e| Error::io("write", &path, e.into()))?;
        Ok(files::replace(&path, &bytes, 0o600)?)
    }

    /// The image that has a name.
    pub(super) fn get(&self, reference: &str) -> Option<Digest> {
        self.repositories.get(repository(reference))?.get(reference).copied()
    }

    /// Gives a name to an image.
    pub(super) fn set(&mut self, reference: &str, image: Digest) {
        let names = self.repositories.entry(repository(reference).to_owned()).or_default();
        names.insert(reference.to_owned(), image);
    }

    /// Removes a name.
    pub(super) fn remove(&mut self, reference: &str) {
        let name = repository(reference);
        if let Some(names) = self.repositories.get_mut(name) {
            names.remove(reference);
            if names.is_empty() {
                self.repositories.remove(name);
            }
        }
    }

    /// Whether there is no name at all.
    pub(super) fn is_empty(&self) -> bool {
        self.repositories.is_empty()
    }

    /// All names with their images.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Digest)> {
        self.repositories.values().flatten().map(|(name, image)| (name.as_str(), *image))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_their_repositories() {
        for (reference, name) in [
            ("alpine:3.20", "alpine"),
            ("localhost:5000/a/b:v1", "localhost:5000/a/b"),
            ("localhost:5000/a", "localhost:5000/a"),
            ("q.io/a@sha256:00", "q.io/a"),
        ] {
            assert_eq!(repository(reference), name);
        }
    }

    /// As dockerd 20.10 writes it.
    #[test]
    fn the_file_is_dockers() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.make_directories().unwrap();
        let id = Digest::of(b"i");
        let text = format!("{{\"Repositories\":{{\"r:5000/a\":{{\"r:5000/a:v1\":\"{id}\"}}}}}}");
        std::fs::write(root.repositories(), &text).unwrap();
        let mut references = References::read(&root).unwrap();
        assert_eq!(references.get("r:5000/a:v1"), Some(id));
        references.set("b:1", id);
        references.set("b@sha256:00", id);
        references.remove("b:1");
        references.remove("b@sha256:00");
        references.remove("none:1");
        references.write(&root).unwrap();
        assert_eq!(std::fs::read_to_string(root.repositories()).unwrap(), text);
        std::fs::write(root.repositories(), "{").unwrap();
        assert!(References::read(&root).unwrap_err().to_string().contains("cannot be understood"));
    }
}
