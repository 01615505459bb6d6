//! What the first start of an image will need, by the look of it: for images that no start is known of.
//!
//! A container's start is followed on paper: the command is found through PATH, then come scripts' interpreters, the dynamic loader,
//! libraries as the loader finds them, the commands of shell scripts, and what Python, Node and Java read before a program's first line and
//! because of its imports. Files are read in the store; nothing is run.
//!
//! ```text
//! config ─▶ command ─▶ #! ─▶ ELF ─▶ PT_INTERP, DT_NEEDED by RPATH, LD_LIBRARY_PATH, RUNPATH, ld.so.cache
//!                                └─▶ sh: commands   python: imports   node: requires   java: its VM
//! ```
//!
//! A guess is a hint like any profile, and the first trace replaces it. Images are untrusted input: what is read, and how much is guessed, is
//! bounded.
//!
//! - `files`: the image's files. `elf`: programs and libraries. `libraries`: where the loader looks. `scripts`: what scripts name.
//!   `runtimes`: shells, Python, Node, Java.

mod elf;
mod files;
mod libraries;
mod runtimes;
mod scripts;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use store::blocks::Blocks;
use store::image::ImageRecord;
use store::image_config::{Process, process};
use store::layer::{Member, Source};
use store::profile::{PieceKey, PrefetchProfile};

use super::Profiles;
use super::build::Chunks;
use super::built::BuildError;
use elf::Elf;
use files::{File, Files, base_name, join, parent};
use libraries::Libraries;

/// The most content that is guessed, bytes.
const CONTENT_MAX: u64 = 64 << 20;
/// The most files that are looked at.
const FILES_MAX: usize = 4096;
/// Programs and libraries of at most this size are taken whole, bytes; of larger ones, the parts that the loader reads.
const WHOLE_MAX: u64 = 8 << 20;
/// How deep scripts may start each other.
const DEPTH_MAX: usize = 6;
/// Where commands are found if the image does not say, as in Docker.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Files that most programs read through their C library.
const COMMON: [&str; 4] = ["/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/localtime"];
/// Files of a program's own directory below `/etc` that are taken, and their largest size, bytes.
const SETTINGS_MAX: usize = 64;
const SETTING_MAX: u64 = 64 << 10;

impl Profiles {
    /// A guess at what starts of an image need; nothing if there is no telling. Blocks on the shared disk.
    pub(super) fn guessed(&self, image: &ImageRecord) -> Result<Option<PrefetchProfile>, BuildError> {
        let Some(chain) = image.top_chain() else { return Ok(None) };
        let pieces = self.guessed_pieces(image)?;
        Ok((!pieces.is_empty()).then(|| PrefetchProfile::guessed(chain, pieces)))
    }

    /// The pieces that starts of an image need by its look, in order. Blocks on the shared disk.
    pub(super) fn guessed_pieces(&self, image: &ImageRecord) -> Result<Vec<(PieceKey, Blocks)>, BuildError> {
        let Ok(process) = process(&self.publisher.store().blob(&image.config)?) else { return Ok(Vec::new()) };
        let Some(tree) = self.merged_tree(image)? else { return Ok(Vec::new()) };
        let mut guess = Guess::new(Files::new(tree, Chunks::new(self)), &process);
        guess.start(&process.arguments)?;
        Ok(guess.pieces)
    }
}

/// A guess that is being made.
struct Guess<'a> {
    files: Files<'a>,
    process: &'a Process,
    libraries: Option<Libraries>,
    /// Files that were looked at.
    seen: HashSet<Member>,
    /// What was guessed, in order.
    pieces: Vec<(PieceKey, Blocks)>,
    /// Where each piece is in `pieces`.
    places: HashMap<PieceKey, usize>,
    bytes: u64,
}

impl<'a> Guess<'a> {
    fn new(files: Files<'a>, process: &'a Process) -> Guess<'a> {
        let (seen, places) = (HashSet::new(), HashMap::new());
        Guess { files, process, libraries: None, seen, pieces: Vec::new(), places, bytes: 0 }
    }

    /// Follows the start of a container with these arguments.
    fn start(&mut self, arguments: &[String]) -> Result<(), store::Error> {
        self.command(arguments, 0)?;
        if !self.pieces.is_empty() {
            for path in COMMON {
                self.whole_at(path.as_bytes())?;
            }
        }
        Ok(())
    }

    /// The first word is a command, the others are its arguments.
    fn command(&mut self, words: &[String], depth: usize) -> Result<(), store::Error> {
        let Some((first, arguments)) = words.split_first() else { return Ok(()) };
        match self.found_in_path(first)? {
            Some((invoked, program)) => self.program(&invoked, &program, arguments, depth),
            None => Ok(()),
        }
    }

    /// The executable file that a command means, and the path by which it is found.
    fn found_in_path(&self, command: &str) -> Result<Option<(Vec<u8>, File)>, store::Error> {
        let candidates: Vec<Vec<u8>> = if command.contains('/') {
            vec![self.in_working_dir(command.as_bytes())]
        } else {
            let path = self.process.variable("PATH").unwrap_or(DEFAULT_PATH);
            path.split(':').map(|directory| join(directory.as_bytes(), command.as_bytes())).collect()
        };
        for candidate in candidates {
            if let Some(file) = self.files.file(&candidate)?.filter(File::is_executable) {
                return Ok(Some((candidate, file)));
            }
        }
        Ok(None)
    }

    fn in_working_dir(&self, path: &[u8]) -> Vec<u8> {
        join(self.process.working_dir.as_bytes(), path)
    }

    /// A program that is executed: a script with its interpreter, or an ELF file with its libraries.
    fn program(&mut self, invoked: &[u8], file: &File, arguments: &[String], depth: usize) -> Result<(), store::Error> {
        if depth > DEPTH_MAX || self.is_full() {
            return Ok(());
        }
        let head = self.files.read(file, 0, 256)?.unwrap_or_default();
        if let Some(line) = head.strip_prefix(b"#!") {
            if !self.whole(file)? {
                return Ok(());
            }
            let line =
                String::from_utf8_lossy(line.split(|byte| *byte == b'\n').next().unwrap_or_default()).into_owned();
            let mut words: Vec<String> =
                line.trim().splitn(2, char::is_whitespace).map(|word| word.trim().to_owned()).collect();
            words.push(String::from_utf8_lossy(&join(b"", &file.path)).into_owned());
            words.extend_from_slice(arguments);
            return self.command(&words, depth + 1);
        }
        if !head.starts_with(b"\x7fELF") {
            return Ok(());
        }
        self.linked(file)?;
        self.settings_of(base_name(invoked))?;
        self.runtime(invoked, file, arguments, depth)
    }

    /// An ELF file, its dynamic loader and its libraries.
    fn linked(&mut self, program: &File) -> Result<(), store::Error> {
        let nowhere: Arc<[Vec<u8>]> = Arc::new([]);
        let mut queue = vec![(program.clone(), Arc::clone(&nowhere))];
        let mut of_program = nowhere;
        while let Some((file, inherited)) = queue.pop() {
            if self.is_full() || self.seen.contains(&file.member) {
                continue;
            }
            let Some(elf) = self.parsed(&file)? else { continue };
            self.add_elf(&file, &elf)?;
            if let Some(loader) = &elf.interpreter {
                self.interpreter(loader)?;
            }
            let expand = |paths: &[Vec<u8>]| -> Vec<Vec<u8>> {
                paths.iter().map(|path| expanded(path, parent(&file.path))).collect()
            };
            // What a program's RPATH says holds for its libraries, too.
            let rpath = [expand(&elf.rpath), inherited.to_vec()].concat();
            if file.member == program.member {
                of_program = rpath.clone().into();
            }
            let runpath = expand(&elf.runpath);
            // Pushed in reverse, so that they come in the loader's order.
            for name in elf.needed.iter().rev() {
                let library = self.library(name, &rpath, &runpath, &elf)?;
                let library = library.filter(|library| !self.seen.contains(&library.member) && queue.len() < FILES_MAX);
                queue.extend(library.map(|library| (library, Arc::clone(&of_program))));
            }
        }
        Ok(())
    }

    /// What an ELF file says of itself; nothing if it is none.
    fn parsed(&mut self, file: &File) -> Result<Option<Elf>, store::Error> {
        let mut failed = None;
        let parsed = elf::parse(&mut |offset, len| {
            self.files.read(file, offset, len).unwrap_or_else(|error| {
                failed = Some(error);
                None
            })
        });
        failed.map_or(Ok(parsed), Err)
    }

    fn interpreter(&mut self, path: &[u8]) -> Result<(), store::Error> {
        self.whole_at(path)?;
        self.whole_at(b"/etc/ld.so.cache")
    }

    /// The library that the loader would take.
    fn library(
        &mut self,
        name: &[u8],
        rpath: &[Vec<u8>],
        runpath: &[Vec<u8>],
        user: &Elf,
    ) -> Result<Option<File>, store::Error> {
        if self.libraries.is_none() {
            self.libraries = Some(Libraries::of(&mut self.files)?);
        }
        let variable = self.process.variable("LD_LIBRARY_PATH").unwrap_or_default();
        let told = variable
            .split(':')
            .filter(|directory| !directory.is_empty())
            .map(|directory| directory.as_bytes().to_vec());
        let directories = rpath.iter().cloned().chain(told).chain(runpath.iter().cloned());
        let mut candidates: Vec<Vec<u8>> = directories.map(|directory| join(&directory, name)).collect();
        candidates.extend(self.libraries.iter().flat_map(|libraries| libraries.candidates(name)));
        if name.contains(&b'/') {
            candidates = vec![name.to_vec()];
        }
        for candidate in candidates {
            let Some(file) = self.files.file(&candidate)? else { continue };
            let head = self.files.read(&file, 0, elf::KIND_LEN)?.unwrap_or_default();
            if elf::kind_of(&head) == Some(user.kind) {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    /// A program's settings: the small files in a directory of its name.
    fn settings_of(&mut self, program: &[u8]) -> Result<(), store::Error> {
        let directory = join(b"/etc", program);
        for name in self.files.names(&directory)?.iter().take(SETTINGS_MAX) {
            if let Some(file) = self.files.file(&join(&directory, name))?.filter(|file| file.inode.size <= SETTING_MAX)
            {
                self.whole(&file)?;
            }
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.bytes >= CONTENT_MAX || self.seen.len() >= FILES_MAX
    }

    /// Adds the file at `path`, if there is one.
    fn whole_at(&mut self, path: &[u8]) -> Result<(), store::Error> {
        match self.files.file(path)? {
            Some(file) => self.whole(&file).map(drop),
            None => Ok(()),
        }
    }

    /// Adds all of a file that is not too large; returns whether it is seen for the first time.
    fn whole(&mut self, file: &File) -> Result<bool, store::Error> {
        if self.is_full() || !self.seen.insert(file.member) {
            return Ok(false);
        }
        let end = if file.inode.size <= WHOLE_MAX { file.inode.size } else { 1 };
        self.add(file, 0, end)?;
        Ok(true)
    }

    /// Adds what the loader reads of a program or library.
    fn add_elf(&mut self, file: &File, elf: &Elf) -> Result<(), store::Error> {
        if file.inode.size <= WHOLE_MAX {
            return self.whole(file).map(drop);
        }
        self.seen.insert(file.member);
        for part in &elf.hot {
            self.add(file, part.start, part.end)?;
        }
        Ok(())
    }

    /// Adds the blocks that hold the bytes from `start` to `end` of a file.
    fn add(&mut self, file: &File, start: u64, end: u64) -> Result<(), store::Error> {
        let tree = self.files.tree();
        let index = tree.index(file.member)?;
        let layer = (tree.layers().len() - 1 - usize::from(file.member.layer)) as u16;
        let piece_size = u64::from(index.header().piece_size).max(1);
        let (start, end) = (start.min(file.inode.size), end.min(file.inode.size));
        for number in start / piece_size..end.div_ceil(piece_size) {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let piece = index.piece(&file.inode, number)?;
            let key = PieceKey { layer, inode: file.member.inode, piece: number };
            let within = |at: u64| at.saturating_sub(piece.offset).min(piece.len.into()) as u32;
            let wanted = Blocks::of_range(within(start), within(end), piece.len);
            let place = self.places.get(&key).copied();
            let known = place.map_or(Blocks::NONE, |place| self.pieces[place].1);
            let new = u64::from(wanted.without(known).content_len(piece.len));
            if piece.source == Source::Hole || new == 0 || self.bytes + new > CONTENT_MAX {
                continue;
            }
            self.bytes += new;
            let all = known.and(wanted).whole_if_all(piece.len);
            match place {
                Some(place) => self.pieces[place].1 = all,
                None => {
                    self.places.insert(key, self.pieces.len());
                    self.pieces.push((key, all));
                }
            }
        }
        Ok(())
    }
}

/// A directory of an RPATH, in which `$ORIGIN` means the directory of the file that names it.
fn expanded(path: &[u8], origin: &[u8]) -> Vec<u8> {
    for name in [&b"${ORIGIN}"[..], b"$ORIGIN"] {
        if let Some(rest) = path.strip_prefix(name) {
            return [b"/", origin, rest].concat();
        }
    }
    path.to_vec()
}

#[cfg(test)]
mod tests;
