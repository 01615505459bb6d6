//! POSIX access control lists in extended attributes, as the kernel keeps them after Docker sets one and then the file's mode.

/// The only version of the format; a list begins with it, in four bytes.
const VERSION: u32 = 2;
const NO_LIST: &str = "has an access list that the kernel refuses";

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// One entry of a list: whom it applies to, and what they may do.
#[derive(Clone, Copy)]
struct Line {
    tag: u16,
    may: u16,
    id: u32,
}

/// The entries of a list in the kernel's order. Empty if the list has another version, which the kernel ignores.
fn lines(value: &[u8]) -> Result<Vec<Line>, &'static str> {
    let (version, rest) = value.split_first_chunk().ok_or(NO_LIST)?;
    if u32::from_le_bytes(*version) != VERSION {
        return Ok(Vec::new());
    }
    let (lines, []) = rest.as_chunks::<8>() else { return Err(NO_LIST) };
    let line = |[t0, t1, m0, m1, id @ ..]: &[u8; 8]| Line {
        tag: u16::from_le_bytes([*t0, *t1]),
        may: u16::from_le_bytes([*m0, *m1]),
        id: u32::from_le_bytes(*id),
    };
    let lines: Vec<Line> = lines.iter().map(line).collect();
    if lines.is_empty() || is_valid(&lines) { Ok(lines) } else { Err(NO_LIST) }
}

/// Whether the entries are valid and in order: the owner, users by id, the group, groups by id, a mask (required if there are ids),
/// everybody else.
fn is_valid(lines: &[Line]) -> bool {
    let tags: Vec<u16> = lines.iter().map(|line| line.tag).collect();
    let named = tags.iter().any(|tag| matches!(*tag, USER | GROUP));
    let once = [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|tag| tags.iter().filter(|other| *other == tag).count() == 1);
    let masks = tags.iter().filter(|tag| **tag == MASK).count();
    let known =
        lines.iter().all(|line| line.may < 8 && [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER].contains(&line.tag));
    let ids = lines.iter().all(|line| !matches!(line.tag, USER | GROUP) || line.id != u32::MAX);
    tags.is_sorted() && once && known && ids && masks <= 1 && (masks == 1 || !named)
}

/// Whether the kernel keeps a directory's default list. It drops an empty list and one of another version. The error is for a list that it
/// refuses.
pub(super) fn is_kept(value: &[u8]) -> Result<bool, &'static str> {
    lines(value).map(|lines| !lines.is_empty())
}

/// A file's list once the file has these permissions; `None` if the permissions express all of it.
pub(super) fn with_permissions(value: &[u8], permissions: u32) -> Result<Option<Vec<u8>>, &'static str> {
    let mut lines = lines(value)?;
    if lines.iter().all(|line| matches!(line.tag, USER_OBJ | GROUP_OBJ | OTHER)) {
        return Ok(None);
    }
    let has_mask = lines.iter().any(|line| line.tag == MASK);
    for line in &mut lines {
        let bits = match line.tag {
            USER_OBJ => permissions >> 6,
            GROUP_OBJ if !has_mask => permissions >> 3,
            MASK => permissions >> 3,
            OTHER => permissions,
            _ => continue,
        };
        line.may = (bits & 7) as u16;
    }
    let mut out = VERSION.to_le_bytes().to_vec();
    for Line { tag, may, id } in lines {
        let id = if matches!(tag, USER | GROUP) { id } else { u32::MAX };
        out.extend([&tag.to_le_bytes()[..], &may.to_le_bytes(), &id.to_le_bytes()].concat());
    }
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(lines: &[(u16, u16, u32)]) -> Vec<u8> {
        let line =
            |(tag, may, id): &(u16, u16, u32)| [&tag.to_le_bytes()[..], &may.to_le_bytes(), &id.to_le_bytes()].concat();
        [&VERSION.to_le_bytes()[..], &lines.iter().flat_map(line).collect::<Vec<_>>()].concat()
    }

    #[test]
    fn the_mode_goes_into_the_list() {
        let of = |user, mask, other| {
            list(&[
                (1, user, u32::MAX),
                (2, 4, 1000),
                (4, 6, u32::MAX),
                (0x10, mask, u32::MAX),
                (0x20, other, u32::MAX),
            ])
        };
        assert_eq!(with_permissions(&of(6, 4, 4), 0o644), Ok(Some(of(6, 4, 4))));
        assert_eq!(with_permissions(&of(6, 4, 4), 0o4751), Ok(Some(of(7, 5, 1))));
        assert_eq!(
            with_permissions(&list(&[(1, 6, 0), (4, 4, 0), (0x20, 0, 0)]), 0o777),
            Ok(None),
            "the mode says it all"
        );
        assert_eq!(with_permissions(b"\x01\0\0\0anything", 0o644), Ok(None), "the kernel knows no such version");
        assert_eq!(is_kept(&of(6, 4, 4)), Ok(true));
    }

    #[test]
    fn lists_have_one_order() {
        let bad: [&[(u16, u16, u32)]; 5] = [
            &[(1, 6, 0)],
            &[(4, 4, 0), (1, 6, 0), (0x20, 0, 0)],
            &[(1, 6, 0), (2, 4, 5), (4, 4, 0), (0x20, 0, 0)],
            &[(1, 8, 0), (4, 4, 0), (0x20, 0, 0)],
            &[(1, 6, 0), (2, 4, u32::MAX), (4, 4, 0), (0x10, 4, 0), (0x20, 0, 0)],
        ];
        for lines in bad {
            assert!(is_kept(&list(lines)).is_err(), "{lines:?}");
        }
        assert!(is_kept(b"\x02\0").is_err() && is_kept(b"\x02\0\0\0\x01").is_err());
    }
}
