/* Lists directories as a 32-bit program without large-file support does: getdents and stat, not their 64-bit successors. For each
   entry it prints what both give, and at the first error the call and its number. Freestanding: no 32-bit C library is needed. */

static int call(int number, long a, const void *b, long c) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}

enum { EXIT = 1, WRITE = 4, OPEN = 5, CHDIR = 12, LSEEK = 19, LSTAT = 107, GETDENTS = 141, DIRECTORY = 0200000 };

struct stat32 {
    unsigned long dev, ino;
    unsigned short mode, nlink, uid, gid;
    unsigned long rest[12];
};

struct dirent32 {
    unsigned long ino, next;
    unsigned short len;
    char name[];
};

static char buffer[512] __attribute__((aligned(8)));

static void put(const char *text) {
    int len = 0;
    while (text[len]) len++;
    call(WRITE, 1, text, len);
}

static void put_number(unsigned long number) {
    char digits[12];
    int at = sizeof digits;
    digits[--at] = 0;
    do digits[--at] = '0' + number % 10; while (number /= 10);
    put(digits + at);
}

static void fail(const char *what, const char *name, int error) {
    put(what);
    put(" ");
    put(name);
    put(" fails with ");
    put_number(-error);
    put("\n");
    call(EXIT, 1, 0, 0);
}

static void list(const char *path) {
    int directory = call(OPEN, (long)path, (void *)DIRECTORY, 0), len;
    if (directory < 0) fail("open", path, directory);
    if ((len = call(CHDIR, (long)path, 0, 0)) < 0) fail("chdir", path, len);
    while ((len = call(GETDENTS, directory, buffer, sizeof buffer)) != 0) {
        if (len < 0) fail("getdents", path, len);
        unsigned long next = 0;
        for (int at = 0; at < len;) {
            struct dirent32 *entry = (void *)(buffer + at);
            struct stat32 found;
            int error = call(LSTAT, (long)entry->name, &found, 0);
            if (error < 0) fail("lstat", entry->name, error);
            put_number(entry->ino);
            put(" ");
            put_number(found.ino);
            put(" ");
            put(entry->name);
            put("\n");
            next = entry->next;
            at += entry->len;
        }
        /* As telldir and seekdir do. */
        int moved = call(LSEEK, directory, (void *)next, 0);
        if (moved < 0) fail("lseek", path, moved);
    }
}

__asm__(".globl _start\n_start: mov %esp, %eax\n push %eax\n call begin\n");

void begin(long *stack) {
    if (stack[0] != 2) fail("argument", "DIRECTORY", 0);
    list((char *)stack[2]);
    call(EXIT, 0, 0, 0);
}
