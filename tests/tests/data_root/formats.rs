//! The written files, compared with those that dockerd 20.10 writes for the same image from its tar.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::read::GzDecoder;
use serde::Deserialize;
use tests::docker::Docker;
use tests::images::{ImageFiles, digest_of_reader, hex, image};

use super::host::Host;

/// One line of `tar-split.json.gz`.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(rename = "type")]
    kind: u8,
    name: Option<String>,
    name_raw: Option<String>,
    #[serde(default)]
    size: u64,
    payload: Option<String>,
    position: usize,
}

impl Line {
    fn name(&self) -> Result<Vec<u8>> {
        match &self.name_raw {
            Some(raw) => Ok(STANDARD.decode(raw)?),
            None => Ok(self.name.clone().unwrap_or_default().into_bytes()),
        }
    }
}

fn lines(path: &Path) -> Result<Vec<Line>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    BufReader::new(GzDecoder::new(file)).lines().map(|line| Ok(serde_json::from_str(&line?)?)).collect()
}

/// The digest of the tar stream that these lines and the layer's tree produce.
fn reassembled(lines: &[Line], tree: &Path) -> Result<String> {
    use std::os::unix::ffi::OsStringExt;
    let mut stream = tempfile::tempfile()?;
    for (number, line) in lines.iter().enumerate() {
        assert_eq!(line.position, number);
        if line.kind == 2 {
            stream.write_all(&STANDARD.decode(line.payload.as_deref().unwrap_or_default())?)?;
        } else if line.size > 0 {
            let name = std::ffi::OsString::from_vec(line.name()?);
            let path = tree.join(name.to_str().map_or(Path::new(&name), |n| Path::new(n.trim_start_matches('/'))));
            let copied = std::io::copy(&mut File::open(&path)?, &mut stream)?;
            assert_eq!(copied, line.size, "{}", path.display());
        }
    }
    std::io::Seek::rewind(&mut stream)?;
    Ok(digest_of_reader(stream)?)
}

/// Names, sizes and checksums of the files with content.
fn files(lines: &[Line]) -> Result<BTreeMap<Vec<u8>, (u64, String)>> {
    let files = lines.iter().filter(|line| line.kind == 1 && line.size > 0);
    files.map(|line| Ok((line.name()?, (line.size, line.payload.clone().unwrap_or_default())))).collect()
}

fn entry(data_root: &Path, chain: &str) -> PathBuf {
    data_root.join("image/overlay2/layerdb/sha256").join(hex(chain))
}

fn assert_same(image: &ImageFiles, docker: &Path, ours: &Path) {
    let config = Path::new("image/overlay2/imagedb/content/sha256").join(hex(&image.config.digest));
    let read = |root: &Path| std::fs::read(root.join(&config)).unwrap();
    assert_eq!(read(docker), read(ours));
    for (number, (chain, diff_id)) in image.chain_ids().iter().zip(image.diff_ids()).enumerate() {
        let (docker, entry) = (entry(docker, chain), entry(ours, chain));
        let mut names = vec!["diff", "size"];
        names.extend((number > 0).then_some("parent"));
        for name in names {
            let read = |entry: &Path| std::fs::read_to_string(entry.join(name)).unwrap();
            assert_eq!(read(&entry), read(&docker), "{name} of layer {number} of {}", image.name);
        }
        let list = |entry: &Path| {
            let mut names: Vec<_> = std::fs::read_dir(entry).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(list(&entry), list(&docker));
        let cache_id = std::fs::read_to_string(entry.join("cache-id")).unwrap();
        let tree = ours.join("overlay2").join(cache_id).join("diff");
        let (expected, found) = (lines(&docker.join("tar-split.json.gz")), lines(&entry.join("tar-split.json.gz")));
        let (expected, found) = (expected.unwrap(), found.unwrap());
        assert_eq!(reassembled(&found, &tree).unwrap(), diff_id);
        assert_eq!(files(&found).unwrap(), files(&expected).unwrap(), "layer {number} of {}", image.name);
    }
}

#[test]
fn layers_are_described_as_dockerd_describes_them() {
    let images = ["small", "torture-zstd", "bash"].map(|name| image(name).unwrap());
    let host = Host::prepare_with(&images).unwrap();
    let docker = Docker::start().unwrap();
    for image in &images {
        docker.load(image).unwrap();
        assert_same(image, docker.data_root(), &host.data);
    }
}
