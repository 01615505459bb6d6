//! Lines as dockerd writes them, and streams as dockerd puts them together again.

use super::*;
use crate::docker::samples::{self, Part};

fn lines(parts: &[Part]) -> (String, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = samples::store(dir.path());
    let (diff_id, stream) = samples::layer(&publisher, parts);
    let mut out = Vec::new();
    write(publisher.store(), &publisher.store().index(&diff_id).unwrap(), &mut out).unwrap();
    (String::from_utf8(out).unwrap(), stream)
}

/// The lines that dockerd 20.10 wrote for a file `a` of `hello\n`, with `head` and `tail` in place of headers.
#[test]
fn lines_are_dockers() {
    let (lines, _) = lines(&[Part::Literal(b"head"), Part::File("a", "hello\n"), Part::Literal(b"tail")]);
    assert_eq!(
        lines,
        "{\"type\":2,\"payload\":\"aGVhZA==\",\"position\":0}\n\
         {\"type\":1,\"name\":\"a\",\"size\":6,\"payload\":\"YUw+7uLYEAA=\",\"position\":1}\n\
         {\"type\":2,\"payload\":\"dGFpbA==\",\"position\":2}\n"
    );
}

/// The stream that dockerd makes of lines, with the files that the tree has.
fn reassemble(lines: &str, files: &[(&str, &str)]) -> Vec<u8> {
    let mut stream = Vec::new();
    for (position, line) in lines.lines().enumerate() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["position"], position);
        if line["type"] == 1 {
            let file = files.iter().find(|(name, _)| line["name"] == *name).unwrap();
            stream.extend_from_slice(file.1.as_bytes());
        } else {
            stream.extend(decode(line["payload"].as_str().unwrap()));
        }
    }
    stream
}

fn decode(text: &str) -> Vec<u8> {
    STANDARD.decode(text).unwrap()
}

#[test]
fn what_docker_could_not_find_in_the_tree_is_written_out() {
    let (lines, stream) = lines(&[
        Part::Literal(b"1"),
        Part::Replaced("a", "an older a"),
        Part::Literal(b"2"),
        Part::File("a", "the a that stays"),
        Part::Range("part", "only the middle counts", 5..11),
        Part::Named("up", "through the parent", b"x/../up"),
        Part::Named("else", "not at that name", b"other"),
        Part::File("empty", ""),
        Part::Literal(b"3"),
    ]);
    assert_eq!(lines.matches("\"type\":1").count(), 1);
    assert_eq!(reassemble(&lines, &[("a", "the a that stays")]), stream);
}

#[test]
fn names_of_any_bytes_and_every_name_once() {
    let (lines, stream) =
        lines(&[Part::Named("x", "1", b"./x"), Part::Named("<&>\u{2028}", "2", "<&>\u{2028}".as_bytes())]);
    assert_eq!(reassemble(&lines, &[("./x", "1"), ("<&>\u{2028}", "2")]), stream);
    let mut out = Vec::new();
    Writer { out: &mut out, position: 0 }.file(b"\xe9", 1, 1).unwrap();
    assert_eq!(out, b"{\"type\":1,\"name_raw\":\"6Q==\",\"size\":1,\"payload\":\"AAAAAAAAAAE=\",\"position\":0}\n");
    assert_eq!(cleaned(b"./a//b/"), b"a/b");
    assert_eq!(cleaned(b"/a/./b"), b"a/b");
}
