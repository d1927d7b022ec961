/* Runs a command and writes down, in order, every system call that changes files below a folder.

       powercut FOLDER JOURNAL KILL HALF COMMAND...

   Writes  JOURNAL: a line per call, "<call> <sizes> <path> [<path>]", paths relative to FOLDER with %xx for what is no
           plain character; the bytes of a write and a line break follow its line. replay.py reads it.
   KILL    kills the command before its call number KILL, counted from 1; 0: never.
   HALF    1: if that call is a write, half of its bytes are written first.
   Exits   with the command's code, 128 + its signal, or 77 where ptrace is forbidden.
   Why     ptrace, not a preloaded library: safetensors makes system calls without libc.
   Threads a call below FOLDER ends before any other thread's call begins, so the journal has one order. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_open /* newer architectures have the ...at calls alone */
#define SYS_open -2
#define SYS_creat -3
#define SYS_rename -4
#define SYS_unlink -5
#define SYS_mkdir -6
#define SYS_rmdir -7
#define SYS_link -8
#define SYS_symlink -9
#define SYS_access -10
#endif
#ifndef SYS_renameat
#define SYS_renameat -11
#endif

typedef struct __ptrace_syscall_info Info;
typedef enum {
  NONE, OPEN, WRITE, TRUNCATE, RENAME, EXCHANGE, UNLINK, MKDIR, RMDIR, FSYNC, LINK, MARK, UNKNOWN
} Kind;
typedef struct {
  Kind kind;
  char path[PATH_MAX], other[PATH_MAX]; /* absolute */
  char *data;
  long long size, at; /* bytes of data, or the new size; offset */
  int existed, truncates;
} Call;

static const char *folder;
static FILE *journal;
static long count, kill_at;
static int half;

static void die(const char *what) {
  fprintf(stderr, "powercut: %s: %s\n", what, strerror(errno));
  exit(errno == EPERM ? 77 : 70);
}

/* Copies `size` bytes of a process; returns how many were readable. */
static ssize_t peek(pid_t pid, unsigned long long from, void *to, size_t size) {
  struct iovec here = {to, size}, there = {(void *)from, size};
  return process_vm_readv(pid, &here, 1, &there, 1, 0);
}

/* A path of at most PATH_MAX; a page at a time, since the page after it may not be mapped. */
static void peek_path(pid_t pid, unsigned long long from, char *to) {
  size_t done = 0;
  while (done < PATH_MAX - 1) {
    size_t step = 4096 - (from + done) % 4096;
    if (step > PATH_MAX - 1 - done) step = PATH_MAX - 1 - done;
    ssize_t got = peek(pid, from + done, to + done, step);
    if (got <= 0) break;
    if (memchr(to + done, 0, got)) return;
    done += got;
  }
  to[done] = 0;
}

static int below(const char *path) {
  size_t n = strlen(folder);
  return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

/* The file behind a descriptor, if it is below the folder and still has a name. */
static int path_of(pid_t pid, long long fd, char *to) {
  char link[64];
  if (fd == AT_FDCWD) snprintf(link, sizeof link, "/proc/%d/cwd", pid);
  else snprintf(link, sizeof link, "/proc/%d/fd/%lld", pid, fd);
  ssize_t n = readlink(link, to, PATH_MAX - 1);
  if (n <= 0) return 0;
  to[n] = 0;
  return below(to) && !(n > 10 && strcmp(to + n - 10, " (deleted)") == 0);
}

/* An absolute path with its folder resolved; whether it is below the folder. */
static int resolve(pid_t pid, long long dirfd, unsigned long long from, char *to) {
  char raw[PATH_MAX], joined[2 * PATH_MAX + 1], base[PATH_MAX];
  peek_path(pid, from, raw);
  if (raw[0] == '/') snprintf(joined, sizeof joined, "%s", raw);
  else {
    path_of(pid, (int)dirfd, base);
    snprintf(joined, sizeof joined, "%s/%s", base, raw);
  }
  size_t n = strlen(joined);
  while (n > 1 && joined[n - 1] == '/') joined[--n] = 0;
  char *slash = strrchr(joined, '/'), name[PATH_MAX];
  snprintf(name, sizeof name, "%s", slash + 1);
  *slash = 0;
  if (!realpath(joined[0] ? joined : "/", base)) return 0;
  snprintf(to, PATH_MAX, "%.*s/%.255s", PATH_MAX - 258, base, name);
  return below(to);
}

/* The bytes that a write will write, and where. */
static void gather(pid_t pid, const Info *in, int vector, int positioned, Call *call) {
  unsigned long long fd = in->entry.args[0], n = in->entry.args[2];
  struct iovec one = {(void *)in->entry.args[1], n}, many[IOV_MAX], *parts = &one;
  if (vector) {
    parts = many;
    if (peek(pid, in->entry.args[1], many, n * sizeof *many) < 0) n = 0;
  }
  size_t pieces = vector ? n : 1, total = 0;
  for (size_t i = 0; i < pieces; i++) total += parts[i].iov_len;
  call->data = malloc(total + 1);
  for (size_t i = 0; i < pieces; i++) {
    ssize_t got = peek(pid, (unsigned long long)parts[i].iov_base, call->data + call->size, parts[i].iov_len);
    if (got > 0) call->size += got;
  }
  char name[64], line[128];
  snprintf(name, sizeof name, "/proc/%d/fdinfo/%llu", pid, fd);
  FILE *info = fopen(name, "r");
  unsigned flags = 0;
  while (info && fgets(line, sizeof line, info)) {
    sscanf(line, "pos: %lld", &call->at);
    sscanf(line, "flags: %o", &flags);
  }
  if (info) fclose(info);
  struct stat s;
  if (positioned) call->at = in->entry.args[3];
  if (flags & O_APPEND && stat(call->path, &s) == 0) call->at = s.st_size;
}

static Kind opens(pid_t pid, long long dirfd, unsigned long long path, unsigned long long flags, Call *call) {
  struct stat s;
  if (!resolve(pid, dirfd, path, call->path) || !(flags & (O_CREAT | O_TRUNC))) return NONE;
  call->existed = lstat(call->path, &s) == 0;
  call->truncates = (flags & O_TRUNC) && call->existed && S_ISREG(s.st_mode);
  return call->existed && !call->truncates ? NONE : OPEN;
}

/* What a system call will change. */
static Kind classify(pid_t pid, const Info *in, Call *call) {
  const unsigned long long *a = (const unsigned long long *)in->entry.args;
  long nr = in->entry.nr, cwd = AT_FDCWD;
  if (nr == SYS_open) return opens(pid, cwd, a[0], a[1], call);
  if (nr == SYS_creat) return opens(pid, cwd, a[0], O_CREAT | O_TRUNC, call);
  if (nr == SYS_openat) return opens(pid, (int)a[0], a[1], a[2], call);
  if (nr == SYS_write || nr == SYS_pwrite64 || nr == SYS_writev || nr == SYS_pwritev) {
    if (!path_of(pid, (int)a[0], call->path)) return NONE;
    gather(pid, in, nr == SYS_writev || nr == SYS_pwritev, nr == SYS_pwrite64 || nr == SYS_pwritev, call);
    return WRITE;
  }
  if (nr == SYS_ftruncate) return call->size = a[1], path_of(pid, (int)a[0], call->path) ? TRUNCATE : NONE;
  if (nr == SYS_truncate) return call->size = a[1], resolve(pid, cwd, a[0], call->path) ? TRUNCATE : NONE;
  if (nr == SYS_fsync || nr == SYS_fdatasync) return path_of(pid, (int)a[0], call->path) ? FSYNC : NONE;
  if (nr == SYS_rename || nr == SYS_renameat || nr == SYS_renameat2) {
    int plain = nr == SYS_rename;
    int from = resolve(pid, plain ? cwd : (int)a[0], plain ? a[0] : a[1], call->path);
    int to = resolve(pid, plain ? cwd : (int)a[2], plain ? a[1] : a[3], call->other);
    if (!from && !to) return NONE;
    unsigned long long flags = nr == SYS_renameat2 ? a[4] : 0;
    return !from || !to || flags & RENAME_WHITEOUT ? UNKNOWN : flags & RENAME_EXCHANGE ? EXCHANGE : RENAME;
  }
  if (nr == SYS_unlink) return resolve(pid, cwd, a[0], call->path) ? UNLINK : NONE;
  if (nr == SYS_rmdir) return resolve(pid, cwd, a[0], call->path) ? RMDIR : NONE;
  if (nr == SYS_unlinkat)
    return resolve(pid, (int)a[0], a[1], call->path) ? a[2] & AT_REMOVEDIR ? RMDIR : UNLINK : NONE;
  if (nr == SYS_mkdir) return resolve(pid, cwd, a[0], call->path) ? MKDIR : NONE;
  if (nr == SYS_mkdirat) return resolve(pid, (int)a[0], a[1], call->path) ? MKDIR : NONE;
  if (nr == SYS_access || nr == SYS_faccessat) {
    int at = nr == SYS_faccessat;
    if (!resolve(pid, at ? (int)a[0] : cwd, a[at], call->path)) return NONE;
    return strstr(call->path, "/:") ? MARK : NONE;
  }
  if (nr == SYS_mmap)
    return (a[2] & PROT_WRITE) && (a[3] & MAP_SHARED) && path_of(pid, (int)a[4], call->path) ? UNKNOWN : NONE;
  if (nr == SYS_sendfile || nr == SYS_fallocate) return path_of(pid, (int)a[0], call->path) ? UNKNOWN : NONE;
  if (nr == SYS_copy_file_range || nr == SYS_splice) return path_of(pid, (int)a[2], call->path) ? UNKNOWN : NONE;
  if (nr == SYS_link || nr == SYS_linkat) {
    int at = nr == SYS_linkat;
    int from = resolve(pid, at ? (int)a[0] : cwd, a[at], call->path);
    if (!resolve(pid, at ? (int)a[2] : cwd, at ? a[3] : a[1], call->other)) return NONE;
    if (from && !(at && a[4] & ~AT_SYMLINK_FOLLOW)) return LINK;
    strcpy(call->path, call->other);
    return UNKNOWN;
  }
  if (nr == SYS_symlink) return resolve(pid, cwd, a[1], call->path) ? UNKNOWN : NONE;
  if (nr == SYS_symlinkat) return resolve(pid, (int)a[1], a[2], call->path) ? UNKNOWN : NONE;
  return NONE;
}

static void put_path(const char *path) {
  path += strlen(folder);
  fputc(' ', journal);
  fputc('.', journal);
  for (; *path; path++)
    if (*path > ' ' && *path < 127 && *path != '%') fputc(*path, journal);
    else fprintf(journal, "%%%02x", (unsigned char)*path);
}

static void record(const Call *call, long long result, long nr) {
  static const char *names[] = {0,        0,        "write", "truncate", "rename", "exchange",
                                "unlink", "mkdir", "rmdir", "fsync",  "link",     "mark"};
  if (call->kind == UNKNOWN) fprintf(journal, "unknown %ld", nr);
  else if (call->kind == OPEN) fputs(call->existed ? "truncate 0" : "create", journal);
  else fputs(names[call->kind], journal);
  if (call->kind == WRITE) fprintf(journal, " %lld %lld", call->at, result);
  if (call->kind == TRUNCATE) fprintf(journal, " %lld", call->size);
  put_path(call->path);
  if (call->kind == RENAME || call->kind == EXCHANGE || call->kind == LINK) put_path(call->other);
  fputc('\n', journal);
  if (call->kind == WRITE) {
    fwrite(call->data, 1, result, journal);
    fputc('\n', journal);
  }
  fflush(journal);
}

/* Kills the command in front of this call, half of a write done. */
static void cut(pid_t leader, const Call *call, long nr) {
  if (half && call->kind == WRITE && call->size > 1) {
    int fd = open(call->path, O_WRONLY);
    if (fd < 0 || pwrite(fd, call->data, call->size / 2, call->at) != call->size / 2) die("half a write");
    close(fd);
    record(call, call->size / 2, nr);
  }
  kill(leader, SIGKILL);
}

/* A thread stands in front of a system call. If the call changes the folder, it is done before this returns. */
static void enter(pid_t pid, pid_t leader) {
  Info in, out;
  static Call call;
  memset(&call, 0, sizeof call);
  if (ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof in, &in) <= 0 || in.op != PTRACE_SYSCALL_INFO_ENTRY) return;
  call.kind = classify(pid, &in, &call);
  if (call.kind == NONE) return;
  if (call.kind != MARK && ++count == kill_at) {
    cut(leader, &call, in.entry.nr);
    free(call.data);
    return;
  }
  int status;
  if (ptrace(PTRACE_SYSCALL, pid, 0, 0) == 0 && waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status) &&
      WSTOPSIG(status) == (SIGTRAP | 0x80) && ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof out, &out) > 0 &&
      out.op == PTRACE_SYSCALL_INFO_EXIT && (call.kind == MARK || out.exit.rval >= 0)) {
    record(&call, out.exit.rval, in.entry.nr);
  }
  free(call.data);
}

int main(int argc, char **argv) {
  if (argc < 6) return 64;
  folder = realpath(argv[1], NULL);
  journal = fopen(argv[2], "wb");
  kill_at = atol(argv[3]);
  half = atoi(argv[4]);
  if (!folder || !journal) die("folder or journal");
  pid_t leader = fork();
  if (leader == 0) {
    if (ptrace(PTRACE_TRACEME, 0, 0, 0)) _exit(77);
    raise(SIGSTOP);
    execvp(argv[5], argv + 5);
    _exit(71);
  }
  int status;
  if (waitpid(leader, &status, 0) != leader || !WIFSTOPPED(status)) return 77;
  long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK |
                 PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;
  if (ptrace(PTRACE_SETOPTIONS, leader, 0, options)) die("ptrace");
  ptrace(PTRACE_SYSCALL, leader, 0, 0);
  int code = 0;
  for (pid_t pid; (pid = waitpid(-1, &status, __WALL)) > 0;) {
    if (WIFEXITED(status) || WIFSIGNALED(status)) {
      if (pid == leader) code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      continue;
    }
    int stop = WSTOPSIG(status), event = status >> 16, deliver = 0;
    if (stop == (SIGTRAP | 0x80)) enter(pid, leader);
    else if (!event && stop != SIGTRAP && stop != SIGSTOP) deliver = stop; /* new threads begin with SIGSTOP */
    ptrace(PTRACE_SYSCALL, pid, 0, deliver);
  }
  return code;
}
