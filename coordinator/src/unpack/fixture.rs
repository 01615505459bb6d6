//! Layer tars for tests of the modules that use the unpacker.

/// A file's content: neither uniform nor incompressible.
pub(crate) fn content(number: u8, len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(u32::from(number) + 3) >> 9) as u8 ^ number).collect()
}

/// A tar of these files, owned by root and dated 1970.
pub(crate) fn tar_of<N: AsRef<str>, B: AsRef<[u8]>>(files: impl IntoIterator<Item = (N, B)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(bytes.as_ref().len() as u64);
        builder.append_data(&mut header, name.as_ref(), bytes.as_ref()).expect("memory takes every file");
    }
    builder.into_inner().expect("memory takes the end of a tar")
}
