//! An entry's attributes as they end up on an inode: what the kernel makes of them when Docker sets them.
//!
//! An attribute that the file system cannot hold is left out, as Docker leaves it out. One that the kernel rejects makes Docker fail, so it
//! refuses the layer.

use std::collections::BTreeMap;

use store::layer::Metadata;

use super::acl;
use super::bounds;
use super::tar::TarEntry;

/// File capabilities, which a chown removes.
pub(super) const CAPABILITY: &[u8] = b"security.capability";
/// The access control list that includes a file's permissions.
pub(super) const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
/// An owner id that means none: chown keeps the present owner.
const NOBODY: u32 = u32::MAX;
/// Go's last representable time; Docker sets times outside its range to 1970.
const TIME_MAX: (i64, u32) = (i64::MAX / 1_000_000_000, (i64::MAX % 1_000_000_000) as u32);

/// The kind of inode that attributes are set on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    File,
    Directory,
    Symlink,
    /// A device or a fifo.
    Special,
}

type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// The attributes that an entry gives an inode with the owner and the extended attributes of `old`.
pub(super) fn metadata(entry: &TarEntry, on: On, old: &Metadata) -> Result<Metadata, &'static str> {
    let is_link = on == On::Symlink;
    let time = (entry.mtime, entry.mtime_nsec);
    let in_range = is_link || ((0, 0)..=TIME_MAX).contains(&time);
    let (mtime, mtime_nsec) = if in_range { time } else { (0, 0) };
    let mut xattrs = old.xattrs.clone();
    if on != On::Directory {
        xattrs.remove(CAPABILITY);
    }
    add_xattrs(&mut xattrs, &entry.xattrs, on)?;
    let owner = owner(entry, old);
    // A symbolic link has no permissions of its own.
    let permissions = if is_link { 0o777 } else { entry.mode };
    if let Some(list) = xattrs.remove(ACCESS_ACL)
        && let Some(list) = acl::with_permissions(&list, permissions)?
    {
        xattrs.insert(ACCESS_ACL.to_vec(), list);
    }
    Ok(Metadata { permissions, uid: owner.0, gid: owner.1, mtime, mtime_nsec, xattrs })
}

/// The owner that an entry gives something that belongs to the owner of `old`.
pub(super) fn owner(entry: &TarEntry, old: &Metadata) -> (u32, u32) {
    let or = |id: u32, old: u32| if id == NOBODY { old } else { id };
    (or(entry.uid, old.uid), or(entry.gid, old.gid))
}

fn add_xattrs(xattrs: &mut Xattrs, new: &Xattrs, on: On) -> Result<(), &'static str> {
    for (name, value) in new {
        if is_kept(name, value, on)? {
            xattrs.insert(name.clone(), value.clone());
        }
    }
    let bytes: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    if xattrs.len() > bounds::XATTRS_MAX || bytes > bounds::XATTR_BYTES_MAX {
        Err("has more than 512 extended attributes or 128 KiB of them, which no file system holds")
    } else {
        Ok(())
    }
}

/// Whether an inode keeps an attribute that is set on it; an error if the kernel rejects the attribute.
fn is_kept(name: &[u8], value: &[u8], on: On) -> Result<bool, &'static str> {
    if name.is_empty() {
        return Err("has an extended attribute without a name");
    }
    if name.len() > bounds::XATTR_NAME_MAX || value.len() > bounds::XATTR_VALUE_MAX {
        return Err("has an extended attribute longer than the kernel allows");
    }
    let nameless = "has an extended attribute with nothing behind its first dot";
    match name.split(|byte| *byte == b'.').next() {
        Some(b"user") if !matches!(on, On::File | On::Directory) => Ok(false),
        Some(b"user" | b"trusted" | b"security")
            if name.ends_with(b".") && name.iter().filter(|b| **b == b'.').count() == 1 =>
        {
            Err(nameless)
        }
        // A layer must not steer overlayfs, with redirects or metadata copies for instance.
        Some(b"user" | b"trusted") => Ok(name.contains(&b'.') && !steers_overlayfs(name)),
        Some(b"security") if name == CAPABILITY && !is_capability(value) => {
            Err("has file capabilities in a form that the kernel refuses")
        }
        Some(b"security") => Ok(name.contains(&b'.')),
        _ if name == ACCESS_ACL => Ok(on != On::Symlink),
        _ if name == DEFAULT_ACL && matches!(on, On::File | On::Special) => {
            Err("has a default access list, which only a directory can have")
        }
        _ if name == DEFAULT_ACL && on == On::Directory => acl::is_kept(value),
        _ => Ok(false),
    }
}

fn steers_overlayfs(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// Whether a value is one of the kernel's forms. Revision 2 has 20 bytes, revision 3 has 24; the lowest bit of the first number is a flag.
fn is_capability(value: &[u8]) -> bool {
    let revision = value.first_chunk().map(|magic| u32::from_le_bytes(*magic) & !1);
    matches!((value.len(), revision), (20, Some(0x0200_0000)) | (24, Some(0x0300_0000)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A valid list. A file's list is checked together with the file's mode, a directory's default list alone.
    const LIST: &[u8] = b"\x02\0\0\0\x01\0\x06\0\0\0\0\0\x04\0\x04\0\0\0\0\0\x20\0\0\0\0\0\0\0";

    #[test]
    fn attributes_are_what_the_kernel_makes_of_them() {
        let kept = |name: &str, on| is_kept(name.as_bytes(), b"v", on);
        assert_eq!(kept("user.a", On::File), Ok(true));
        assert_eq!(kept("user.a", On::Symlink), Ok(false));
        assert_eq!(kept("user.", On::Special), Ok(false), "the kernel says first that it may not be there");
        assert_eq!(kept("trusted.a", On::Symlink), Ok(true));
        assert_eq!(kept("security.selinux", On::Special), Ok(true));
        for ignored in ["a", "a.b", "user", "system.a", "trusted", "Security.a", "trusted.overlay.redirect"] {
            assert_eq!(kept(ignored, On::File), Ok(false), "{ignored}");
        }
        for wrong in ["", "user.", "trusted.", "security.", "security.capability", "system.posix_acl_default"] {
            assert!(kept(wrong, On::File).is_err(), "{wrong}");
        }
        assert!(kept("system.posix_acl_default", On::Directory).is_err());
        assert_eq!(is_kept(DEFAULT_ACL, LIST, On::Directory), Ok(true));
    }

    #[test]
    fn capabilities_have_one_of_two_forms() {
        let of = |len: usize, revision: u8, flags: u8| {
            let mut value = vec![0; len];
            (value[0], value[3]) = (flags, revision);
            is_capability(&value)
        };
        assert!(of(20, 2, 0) && of(20, 2, 1) && of(24, 3, 1));
        assert!(!of(20, 3, 0) && !of(24, 2, 0) && !of(12, 1, 0) && !of(20, 2, 2) && !is_capability(b"\x01"));
    }
}
