//! System calls on files of an image do what they do where dockerd extracted it, on trees of both kinds.
//!
//! A Python program in a container makes them and says what came of it. Numbers that are another machine's or another run's business are
//! not said.

use tests::docker::Docker;
use tests::images::image;

use super::host::Host;

/// A line for each kind of call.
const PROGRAM: &str = r#"
import ctypes, errno, fcntl, hashlib, mmap, os, select, struct, subprocess
libc = ctypes.CDLL(None, use_errno=True)
name = os.path.realpath("/usr/bin/python3")
file = os.open(name, os.O_RDONLY)
size = os.fstat(file).st_size

def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]

def say(what, call):
    try:
        said = call()
    except OSError as error:
        said = errno.errorcode[error.errno]
    print(what, said, flush=True)

def copied(copy):
    out = os.open("/tmp/out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    done = 0
    while done < size:
        count = copy(out, done)
        if count == 0:
            break
        done += count
    os.lseek(out, 0, os.SEEK_SET)
    return done, digest(os.read(out, size))

def splice(out, done):
    reader, writer = os.pipe()
    count = os.splice(file, writer, 65536, offset_src=done)
    moved = os.splice(reader, out, count)
    os.close(reader)
    os.close(writer)
    return moved

def direct(flags):
    fd = os.open(name, os.O_RDONLY | os.O_DIRECT | flags)
    buffer = mmap.mmap(-1, (size + 4095) // 4096 * 4096)
    return os.preadv(fd, [buffer], 0), digest(buffer[:size])

def private():
    m = mmap.mmap(file, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    m[0] = 0
    return m[0], digest(m[1:]), os.pread(file, 1, 0)

def shared_writable():
    fd = os.open(name, os.O_RDONLY)
    mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

def watched():
    watch = libc.inotify_init()
    libc.inotify_add_watch(watch, os.path.dirname(name).encode(), 0x1 | 0x10 | 0x20)
    libc.inotify_add_watch(watch, name.encode(), 0x1 | 0x10 | 0x20)
    with open(name, "rb") as opened:
        opened.read(10)
    masks = []
    while select.select([watch], [], [], 0.2)[0]:
        events = os.read(watch, 4096)
        while events:
            _, mask, _, length = struct.unpack("iIII", events[:16])
            masks.append((hex(mask), events[16:16 + length].rstrip(b"\0")))
            events = events[16 + length:]
    return masks

def handle(path):
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    where = ctypes.c_int()
    if libc.name_to_handle_at(-100, path.encode(), buffer, ctypes.byref(where), 0):
        raise OSError(ctypes.get_errno(), "")
    return "given"

def seek(fd, at, whence):
    return os.lseek(fd, at, whence)

def locks():
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(file, fcntl.LOCK_UN)
    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return "taken"

def linked():
    os.link("/etc/passwd", "/etc/linked")
    one, other = os.stat("/etc/passwd"), os.stat("/etc/linked")
    with open("/etc/linked", "a") as opened:
        opened.write("new\n")
    with open("/etc/passwd") as opened:
        return other.st_nlink, one.st_ino == other.st_ino, opened.read().endswith("new\n")

def renamed():
    os.rename("/etc/passwd", "/etc/moved")
    os.rename("/etc/moved", "/etc/passwd")
    return os.stat("/etc/passwd").st_nlink

def statx():
    st = os.stat(name)
    return oct(st.st_mode), st.st_nlink, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, st.st_blksize

say("size", lambda: size)
say("stat", statx)
say("read", lambda: digest(os.pread(file, size, 0)))
say("past the end", lambda: os.pread(file, 10, size + 5))
say("mmap", lambda: digest(mmap.mmap(file, size, mmap.MAP_SHARED, mmap.PROT_READ)[:]))
say("private mmap", private)
say("writable mmap", shared_writable)
say("sendfile", lambda: copied(lambda out, done: os.sendfile(out, file, done, size - done)))
say("splice", lambda: copied(splice))
say("copy_file_range", lambda: copied(lambda out, done: os.copy_file_range(file, out, size - done, offset_src=done)))
say("O_DIRECT", lambda: direct(0))
say("data", lambda: seek(file, 0, os.SEEK_DATA))
say("hole", lambda: seek(file, 0, os.SEEK_HOLE) == size)
say("past the hole", lambda: seek(file, size, os.SEEK_DATA))
say("fadvise", lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED))
say("inotify", watched)
say("handle", lambda: handle(name))
say("locks", locks)
say("fsync", lambda: os.fsync(file))
say("truncate", lambda: os.truncate("/usr", 0))
say("exec", lambda: subprocess.run([name, "-c", "print(6 * 7)"], capture_output=True).stdout)
say("access", lambda: (os.access(name, os.W_OK), os.access(name, os.X_OK), os.access("/etc/shadow", os.R_OK)))
say("acl", lambda: os.getxattr(name, "system.posix_acl_access"))
say("attribute", lambda: os.getxattr(name, "user.none"))
say("listxattr", lambda: os.listxattr(name))
say("long name", lambda: os.stat("/usr/" + "n" * 256))
say("absent", lambda: os.stat("/usr/none"))
say("not a directory", lambda: os.stat(name + "/x"))
say("tmpfile", lambda: os.write(os.open("/usr", os.O_TMPFILE | os.O_RDWR), b"x"))
say("listing", lambda: digest(repr(sorted(os.listdir("/usr/bin"))).encode()))
say("rename", renamed)
say("link", linked)
say("one device", lambda: os.stat("/").st_dev == os.stat(name).st_dev)
"#;

/// What differs on each kind of tree, with why. Where a line here is no longer needed the kernel has improved: correct SEMANTICS.md.
const DIFFERENT: [(&str, &[&str]); 3] = [
    (
        "native",
        &[
            // The file and its copy lie on different file systems, and overlayfs does not tell so: programs copy by reading then.
            "copy_file_range EXDEV",
            // EROFS on a file has none. A file that is opened for writing lies on the host's own disk.
            "O_DIRECT EINVAL",
            // The image's files and what the container writes lie on two file systems.
            "one device False",
        ],
    ),
    ("loop", &["copy_file_range EXDEV", "one device False"]),
    ("fuse", &["copy_file_range EXDEV", "link (2, False, True)", "one device False"]),
];

#[test]
fn programs_make_system_calls_as_on_a_local_disk() {
    let local = Docker::start().unwrap();
    local.load(&image("python3").unwrap()).unwrap();
    let say = |docker: &Docker| docker.ok(&["run", "--rm", "--network", "none", "python3", "python3", "-c", PROGRAM]);
    let expected = say(&local).unwrap();
    assert!(expected.lines().count() > 30, "{expected}");
    for (kind, differences) in DIFFERENT {
        let mut host = Host::prepare_on(&["python3"], kind).unwrap();
        host.start_docker().unwrap();
        // Cold, and then as the kernel has it.
        for _ in 0..2 {
            let said = say(host.docker()).unwrap();
            let differ = said.lines().zip(expected.lines()).filter(|(ours, local)| ours != local);
            assert_eq!(differ.map(|(ours, _)| ours).collect::<Vec<_>>(), differences, "{kind}, locally:\n{expected}");
            assert_eq!(said.lines().count(), expected.lines().count());
        }
    }
}
