//! What the kernel has been told under which number: all that a worker must leave to the next one that serves the same mount.
//!
//! A mount outlives the process that serves it (`mount::keeper`). The kernel then asks the next one for what the first one has named to
//! it, so names and numbers must mean the same there. Whatever can be derived from the store is derived; the rest is here, in two files
//! that exist in memory only and that the keeper holds:
//!
//! - the **records**: one [`Record`] per line, written before the kernel can see what it says. The first line tells the version. A last
//!   line without an end was never answered with, and is cut off. When a record cannot be written (no memory), the file is emptied:
//!   then no other worker can take the mount over, which is given up when this one dies.
//! - the **references**: how often the kernel was told of inodes of each slot, see `layer`. They are counted in place. A worker that dies between
//!   counting and answering counts twice, because the kernel asks again, and one that dies before it counts what the kernel has forgotten never does: then a layer seems to be in use although it is not, as long as the mount lives.
//!
//! The version must change with everything that the numbers depend on: how nodes, data files and offsets of listings are numbered.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::sync::atomic::AtomicI64;

use memmap2::MmapMut;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, OFlags};
use serde::{Deserialize, Serialize};
use store::Digest;
use zerocopy::FromBytes;

use super::catalogue_node::CatalogueNode;
use super::node::Slot;
use super::tree_mounter::Way;
use crate::source::layer_name::LayerName;

/// The first line of the records.
const HEADER: &str = "cachefs kernel state 1";
/// How many slots have references of their own in the file. Those beyond seem to be in use once another worker has taken over.
const REFERENCES: usize = 1 << 20;

/// A connection to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connection {
    /// The mount's.
    Mount,
    /// That of the data files of native trees.
    Data,
}

/// One fact that the next worker must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// How the kernel and the first worker agreed on a connection.
    Handshake {
        /// The connection.
        connection: Connection,
        /// The kernel's request.
        request: Vec<u8>,
        /// The answer.
        reply: Vec<u8>,
    },
    /// A layer got the next slot.
    Layer(LayerName),
    /// The layer of this slot was opened.
    LayerOpened(u32),
    /// A chain of so many layers got the next slots.
    Chain(Digest, usize),
    /// The chain whose first slot this is was opened with the layers of these slots, topmost first.
    ChainOpened(u32, Vec<u32>),
    /// A block of nodes got the next numbers.
    Block(u64),
    /// An entry of the catalogue tree got the next number.
    CatalogueNode(CatalogueNode),
    /// A chain's data file got a number.
    DataFile {
        /// The number.
        number: u64,
        /// The chain.
        chain: Digest,
        /// Its length, bytes.
        len: u64,
    },
    /// The kernel opened a data file.
    DataFileOpened {
        /// Its number.
        number: u64,
        /// The number of the kernel's request.
        request: u64,
    },
    /// The kernel closed a data file.
    DataFileClosed {
        /// Its number.
        number: u64,
        /// The number of the kernel's request.
        request: u64,
    },
    /// Native trees can be mounted in this way.
    Trees(Way),
}

/// The files, and what an earlier worker has left in them.
#[derive(Debug)]
pub struct KernelState {
    /// Guards the end of the records; nothing if they are left to nobody. Held while a record is copied into memory.
    records: Mutex<Option<File>>,
    references: Option<&'static [AtomicI64]>,
    /// What an earlier worker has recorded, in the order in which it did.
    pub earlier: Vec<Record>,
}

impl Default for KernelState {
    /// A state that is left to nobody.
    fn default() -> KernelState {
        KernelState { records: Mutex::new(None), references: None, earlier: Vec::new() }
    }
}

/// Makes the two files, records and references.
pub fn files() -> io::Result<(File, File)> {
    let file = |name| Ok::<_, io::Error>(File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?));
    let (mut file, references) = (file("cachefs-records")?, file("cachefs-references")?);
    writeln!(file, "{HEADER}")?;
    // Whatever a thread that is about to be killed still writes comes behind the rest.
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    references.set_len((REFERENCES * size_of::<AtomicI64>()) as u64)?;
    Ok((file, references))
}

impl KernelState {
    /// The state in these files.
    pub fn open(mut file: File, references: &File) -> io::Result<KernelState> {
        file.seek(SeekFrom::Start(0))?;
        let earlier = read(&mut file)?;
        Ok(KernelState { records: Mutex::new(Some(file)), references: Some(map(references)?), earlier })
    }

    /// Writes a record; when this returns, the kernel may see what it says.
    pub fn record(&self, record: &Record) {
        let mut guard = self.records.lock();
        let Some(file) = guard.as_mut() else { return };
        let written = serde_json::to_vec(record).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            file.write_all(&line)
        });
        if let Err(error) = written {
            tracing::error!("no other worker will be able to take this mount over: {error}");
            let _ = file.set_len(0);
            *guard = None;
        }
    }

    /// Where the references of a slot are counted, if that has a place.
    pub(super) fn references(&self, slot: Slot) -> Option<&'static AtomicI64> {
        self.references?.get(slot.0 as usize)
    }
}

/// All whole records of a file, which is then at its end.
fn read(file: &mut File) -> io::Result<Vec<Record>> {
    let unreadable =
        |why: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, format!("its records {why}"));
    let (mut reader, mut line, mut end, mut records) = (BufReader::new(&mut *file), Vec::new(), 0, Vec::new());
    while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
        match &line[..line.len() - 1] {
            header if end == 0 && header == HEADER.as_bytes() => {}
            _ if end == 0 => return Err(unreadable(&"are of another version")),
            record => records.push(
                serde_json::from_slice(record)
                    .map_err(|error| unreadable(&format_args!("have an unknown one: {error}")))?,
            ),
        }
        end += line.len() as u64;
        line.clear();
    }
    if end == 0 {
        return Err(unreadable(&"were lost for want of memory"));
    }
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    Ok(records)
}

/// The references, in this process's memory for as long as it lives.
#[expect(unsafe_code, reason = "mapping a file is unsafe by itself")]
fn map(file: &File) -> io::Result<&'static [AtomicI64]> {
    // SAFETY: the file exists in memory only, workers that serve one mount are the only ones that have it, they access it through
    // atomics alone, and nobody makes it shorter.
    let mapped = unsafe { MmapMut::map_mut(file)? };
    let bytes = &mut **Box::leak(Box::new(mapped));
    let references = <[AtomicI64]>::mut_from_bytes(bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(references)
}

#[cfg(test)]
mod tests;
