//! What the kernel and the dynamic loader read of a program or a library, whatever it then does.

use std::ops::Range;

use object::elf::{
    DT_NEEDED, DT_RELA, DT_RELASZ, DT_RPATH, DT_RUNPATH, DT_STRSZ, DT_STRTAB, DynamicTag, FileHeader32, FileHeader64,
    PF_W, PT_DYNAMIC, PT_INTERP, PT_LOAD,
};
use object::read::elf::{Dyn as _, FileHeader, ProgramHeader as _};
use object::{Endianness, pod};

/// The longest table that is read, bytes. Larger ones belong to no sane file.
const TABLE_MAX: u64 = 4 << 20;
/// The longest path to an interpreter, as in Linux.
const PATH_MAX: u64 = 4096;
/// How many libraries one file may need, and in how many directories it may have them looked for.
const NEEDED_MAX: usize = 512;
const DIRECTORIES_MAX: usize = 16;
/// The beginning of the file, and what lies around the entry point, are read by any start, bytes.
const AROUND: u64 = 64 << 10;

/// Reads some bytes of the file; nothing if they are not there.
pub(super) type Read<'a> = dyn FnMut(u64, u64) -> Option<Vec<u8>> + 'a;

/// Whether it is of 64 bits, whether it is big-endian, and its machine.
pub(super) type Kind = (bool, bool, u16);

/// An ELF file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Elf {
    /// Class, byte order and machine: a library fits a program only if these are equal.
    pub(super) kind: Kind,
    /// The dynamic loader.
    pub(super) interpreter: Option<Vec<u8>>,
    /// Names of libraries that it needs.
    pub(super) needed: Vec<Vec<u8>>,
    /// Where it looks for libraries before all others: `DT_RPATH`.
    pub(super) rpath: Vec<Vec<u8>>,
    /// Where it looks after `LD_LIBRARY_PATH`: `DT_RUNPATH`.
    pub(super) runpath: Vec<Vec<u8>>,
    /// The parts of the file that are read before its first own instruction.
    pub(super) hot: Vec<Range<u64>>,
}

/// How many of a file's first bytes [`kind_of`] needs.
pub(super) const KIND_LEN: u64 = 20;

/// Class, byte order and machine in the first bytes of an ELF file.
pub(super) fn kind_of(head: &[u8]) -> Option<Kind> {
    let ([0x7f, b'E', b'L', b'F', class, order, ..], Some(machine)) = (head, head.get(18..20)) else { return None };
    let is_big_endian = *order == 2;
    let machine = <[u8; 2]>::try_from(machine).ok()?;
    Some((
        *class == 2,
        is_big_endian,
        if is_big_endian { u16::from_be_bytes(machine) } else { u16::from_le_bytes(machine) },
    ))
}

/// Parses an ELF file; nothing if it is none, or is damaged where the loader would stop.
pub(super) fn parse(read: &mut Read<'_>) -> Option<Elf> {
    let head = read(0, size_of::<FileHeader64<Endianness>>() as u64)?;
    match head.get(4)? {
        1 => parse_as::<FileHeader32<Endianness>>(&head, read),
        2 => parse_as::<FileHeader64<Endianness>>(&head, read),
        _ => None,
    }
}

fn parse_as<H: FileHeader<Endian = Endianness>>(head: &[u8], read: &mut Read<'_>) -> Option<Elf> {
    let (header, _) = pod::from_bytes::<H>(head).ok().filter(|(header, _)| header.is_supported())?;
    let endian = header.endian().ok()?;
    if usize::from(header.e_phentsize(endian)) != size_of::<H::ProgramHeader>() {
        return None;
    }
    let count = usize::from(header.e_phnum(endian));
    let table = read(header.e_phoff(endian).into(), (count * size_of::<H::ProgramHeader>()) as u64)?;
    let (segments, _) = pod::slice_from_bytes::<H::ProgramHeader>(&table, count).ok()?;
    let entry = header.e_entry(endian).into();
    let loads: Vec<Load> =
        segments.iter().filter(|one| one.p_type(endian) == PT_LOAD).map(|one| Load::of::<H>(one, endian)).collect();
    let mut elf = Elf { kind: kind_of(head)?, ..Elf::default() };
    elf.hot.push(0..AROUND);
    elf.hot.extend(
        loads.iter().filter(|load| load.is_writable).map(|load| load.offset..load.offset.saturating_add(load.len)),
    );
    elf.hot.extend(offset_of(&loads, entry).map(|at| at.saturating_sub(AROUND / 2)..at.saturating_add(AROUND / 2)));
    for segment in segments {
        let (offset, len) = segment.file_range(endian);
        match segment.p_type(endian) {
            PT_INTERP => {
                let path = read(offset, len.min(PATH_MAX))?;
                elf.interpreter = path.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
            }
            PT_DYNAMIC => elf.link::<H>(&read(offset, len.min(TABLE_MAX))?, endian, &loads, read)?,
            _ => {}
        }
    }
    Some(elf)
}

impl Elf {
    /// Takes what the dynamic section says.
    fn link<H: FileHeader<Endian = Endianness>>(
        &mut self,
        section: &[u8],
        endian: Endianness,
        loads: &[Load],
        read: &mut Read<'_>,
    ) -> Option<()> {
        let count = section.len() / size_of::<H::Dyn>();
        let (entries, _) = pod::slice_from_bytes::<H::Dyn>(section, count).ok()?;
        let value =
            |tag: DynamicTag| entries.iter().find(|entry| entry.tag(endian) == tag).map(|entry| entry.val(endian));
        let place = |at, len| Some((offset_of(loads, value(at)?)?, value(len)?.min(TABLE_MAX)));
        let (names_at, names_len) = place(DT_STRTAB, DT_STRSZ)?;
        self.hot.push(names_at..names_at.saturating_add(names_len));
        self.hot.extend(place(DT_RELA, DT_RELASZ).map(|(at, len)| at..at.saturating_add(len)));
        let names = read(names_at, names_len)?;
        let name = |at: u64| {
            let rest = names.get(usize::try_from(at).ok()?..)?;
            let rest = &rest[..rest.len().min(PATH_MAX as usize)];
            rest.split(|byte| *byte == 0).next().map(<[u8]>::to_vec)
        };
        let named = |tag: DynamicTag| {
            entries.iter().filter(move |entry| entry.tag(endian) == tag).filter_map(|entry| name(entry.val(endian)))
        };
        let directories = |tag| -> Vec<Vec<u8>> {
            let list = named(tag).next().unwrap_or_default();
            let directories = list.split(|byte| *byte == b':').filter(|directory| !directory.is_empty());
            directories.take(DIRECTORIES_MAX).map(<[u8]>::to_vec).collect()
        };
        self.needed = named(DT_NEEDED).take(NEEDED_MAX).collect();
        self.runpath = directories(DT_RUNPATH);
        // The loader ignores the older kind where there is the newer one.
        self.rpath = if self.runpath.is_empty() { directories(DT_RPATH) } else { Vec::new() };
        Some(())
    }
}

/// A segment that is mapped.
struct Load {
    address: u64,
    offset: u64,
    len: u64,
    is_writable: bool,
}

impl Load {
    fn of<H: FileHeader<Endian = Endianness>>(segment: &H::ProgramHeader, endian: Endianness) -> Load {
        let (offset, len) = segment.file_range(endian);
        let is_writable = segment.p_flags(endian).0 & PF_W.0 != 0;
        Load { address: segment.p_vaddr(endian).into(), offset, len, is_writable }
    }
}

/// Where in the file an address lies.
fn offset_of(loads: &[Load], address: u64) -> Option<u64> {
    let within = |load: &&Load| address.checked_sub(load.address).is_some_and(|at| at < load.len);
    let load = loads.iter().find(within)?;
    load.offset.checked_add(address - load.address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_bytes(bytes: &[u8]) -> Option<Elf> {
        parse(&mut |offset, len| {
            let start = usize::try_from(offset).ok()?.min(bytes.len());
            let end = start.saturating_add(usize::try_from(len).ok()?).min(bytes.len());
            Some(bytes[start..end].to_vec())
        })
    }

    /// A small program, as the linker wrote it.
    fn program() -> Vec<u8> {
        std::fs::read("/bin/sh").unwrap()
    }

    #[test]
    fn a_program_names_its_loader_and_its_libraries() {
        let elf = parse_bytes(&program()).unwrap();
        let interpreter = String::from_utf8(elf.interpreter.clone().unwrap()).unwrap();
        assert!(std::path::Path::new(&interpreter).exists(), "{interpreter}");
        assert!(elf.needed.contains(&b"libc.so.6".to_vec()), "{:?}", elf.needed);
        assert!(elf.kind.0 == cfg!(target_pointer_width = "64"));
        let loader = parse_bytes(&std::fs::read(interpreter).unwrap()).unwrap();
        assert_eq!((loader.kind, loader.interpreter, loader.needed), (elf.kind, None, Vec::new()));
        assert!(parse_bytes(b"#!/bin/sh\n").is_none());
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(at in 0usize..1024, to in any::<[u8; 8]>(), cut in 0usize..5000) {
            let mut bytes = program();
            bytes[at..at + 8].copy_from_slice(&to);
            let _ = parse_bytes(&bytes);
            bytes.truncate(cut);
            let _ = parse_bytes(&bytes);
        }
    }
}
