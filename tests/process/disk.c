/* Loaded into the server with LD_PRELOAD. It keeps beside the real files what a disk would still have after the power was
 * cut: of each file what was in it at its last fsync, of each folder the names that were in it at that folder's.
 *
 * In the folder TIDEMILL_TEST_DISK: f<inode> is a file's content, d<inode> a folder's names, one a line, each after its
 * inode. TIDEMILL_TEST_DISK_IGNORES=files (or folders): a disk that says it has written them and has not. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef int (*sync_call)(int);

static void fail(const char *what) {
  perror(what);
  abort();
}

static void copy_file(const char *from, int to) {
  char buffer[1 << 16];
  int in = open(from, O_RDONLY | O_CLOEXEC);
  if (in < 0) fail("disk.c: open");
  for (;;) {
    ssize_t got = read(in, buffer, sizeof buffer);
    if (got < 0) fail("disk.c: read");
    if (got == 0) break;
    if (write(to, buffer, (size_t)got) != got) fail("disk.c: write");
  }
  close(in);
}

static void copy_names(const char *from, int to) {
  struct dirent *entry;
  DIR *folder = opendir(from);
  if (!folder) fail("disk.c: opendir");
  while ((entry = readdir(folder)))
    if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
      if (dprintf(to, "%llu %s\n", (unsigned long long)entry->d_ino, entry->d_name) < 0) fail("disk.c: dprintf");
  closedir(folder);
}

/* What is copied before the real call is on the disk when that call has returned, and only then counts as kept. */
static int keep(int fd, sync_call real) {
  char from[64], staged[4096], kept[4096];
  const char *disk = getenv("TIDEMILL_TEST_DISK"), *ignores = getenv("TIDEMILL_TEST_DISK_IGNORES");
  struct stat about;
  if (!disk || fstat(fd, &about) != 0) return real(fd);
  int is_folder = S_ISDIR(about.st_mode);
  if (!is_folder && !S_ISREG(about.st_mode)) return real(fd);
  if (ignores && !strcmp(ignores, is_folder ? "folders" : "files")) return real(fd);
  snprintf(from, sizeof from, "/proc/self/fd/%d", fd);
  snprintf(staged, sizeof staged, "%s/staged-%ld", disk, (long)syscall(SYS_gettid));
  snprintf(kept, sizeof kept, "%s/%c%llu", disk, is_folder ? 'd' : 'f', (unsigned long long)about.st_ino);
  int to = open(staged, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  if (to < 0) fail("disk.c: open");
  if (is_folder)
    copy_names(from, to);
  else
    copy_file(from, to);
  close(to);
  int result = real(fd);
  if (result == 0 && rename(staged, kept) != 0) fail("disk.c: rename");
  return result;
}

static sync_call next(const char *name) {
  sync_call found = (sync_call)dlsym(RTLD_NEXT, name);
  if (!found) fail("disk.c: dlsym");
  return found;
}

int fsync(int fd) { return keep(fd, next("fsync")); }
int fdatasync(int fd) { return keep(fd, next("fdatasync")); }
