//! A layer of 4 GiB: memory stays bounded, whatever the layer's size.

use tests::process::peak;
use tests::streamed;

use super::*;

/// The size of the one file: a little over 4 GiB, more than a 32-bit number can hold.
const SIZE: u64 = (4 << 30) + 5000;
/// The limit for the coordinator's memory.
const LIMIT_KIB: u64 = 300 << 10;
/// The size of a part of the content. All parts differ, and each compresses to little more than its noise.
const PART: usize = 1 << 20;
/// The bytes of each part that do not compress.
const NOISE: usize = 4096;

/// The layer's content: repeating text, a number, and a little noise, over and over.
struct Content {
    part: Vec<u8>,
    number: u64,
    /// How many bytes of `part` were read.
    given: usize,
}

impl Content {
    fn new() -> Self {
        let line = b"the quick brown fox jumps over the lazy dog\n";
        let part = line.iter().copied().cycle().take(PART).collect();
        Self { part, number: 0, given: PART }
    }
}

impl std::io::Read for Content {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.given == PART {
            let noise = oddities::noise(self.number, NOISE);
            self.part[..NOISE].copy_from_slice(&noise);
            // Every eighth of a part begins differently, so that no two pieces of the file are equal.
            for at in (0..PART).step_by(PART / 8) {
                self.part[at..at + 8].copy_from_slice(&(self.number << 8 | (at / (PART / 8)) as u64).to_le_bytes());
            }
            self.number += 1;
            self.given = 0;
        }
        let count = out.len().min(PART - self.given);
        out[..count].copy_from_slice(&self.part[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

fn huge_layer(pools: &Pools) -> Result<Layer> {
    streamed::layer(pools, |out| {
        let mut archive = Archive::new(out);
        archive.stream(&Header::new(Kind::File, "huge"), SIZE, Content::new())?;
        archive.finish()?;
        Ok(())
    })
}

#[test]
fn a_layer_of_4_gib_is_pulled_within_300_mib() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let mut site = Site::start().unwrap();
    let pools = Pools::open(directory.path()).unwrap();
    let layer = huge_layer(&pools).unwrap();
    assert!(layer.blob.size < 64 << 20, "the blob is cheap to keep: {} bytes", layer.blob.size);
    let image = ImageBuilder::new("huge").layer(layer).build(&pools, &directory.path().join("huge")).unwrap();
    let reference = registry.push(&image, "huge", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let detail = site.ctl().json(&["image", &reference]).unwrap();
    assert!(detail["size"].as_u64().is_some_and(|size| size > SIZE), "{detail}");
    let pulled = peak(site.coordinator().process().pid()).unwrap() >> 10;
    assert!(pulled < LIMIT_KIB, "pulling took {} MiB", pulled >> 10);

    // Exports the layer again, through a pipe.
    let mut export = Command::new("sh");
    export.args(["-c", r#""$@" | wc -c"#, "sh"]);
    let command = site.ctl().command(&["export", &reference, "-"]).unwrap();
    export.arg(command.get_program()).args(command.get_args());
    let exported: u64 = run(&mut export).unwrap().ok().unwrap().trim().parse().unwrap();
    assert!(exported > SIZE, "{exported} bytes were exported");
    let exporting = peak(site.coordinator().process().pid()).unwrap() >> 10;
    assert!(exporting < LIMIT_KIB, "exporting took {} MiB", exporting >> 10);
    eprintln!("peak: {} MiB after the pull, {} MiB after the export", pulled >> 10, exporting >> 10);
}
