// Runs a kernel on the host: block after block, each thread of a block a fibre with its own stack.
//
// A fibre runs until it waits (__syncthreads, a warp collective) or returns; then the next one that can run goes on.
// `reversed` runs threads, warps and blocks from the last to the first, and lets copies to shared memory arrive at once
// instead of when they are waited for: a kernel that lacks a barrier or a wait gives other results in one of the
// orders. All shared memory is NaN when a block starts.
//
// These end the launch with a message instead of a wrong result: threads that wait for each other for ever, threads
// that meet at different places of the source, a collective that names a lane that is gone, a shuffle from a lane
// outside the mask, an address that is misaligned or not in shared memory where it must be, a write beyond dynamic
// shared memory, and whatever the processor itself stops: null pointers, full stacks, the traps that g++ puts before an
// index outside a declared array or a misaligned access.
#define EMULATOR_RUNTIME
#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *emulator::dynamic_shared;

namespace {
using namespace emulator;
typedef uint64_t u64;
typedef uint32_t u32;

constexpr int MAX_THREADS = 1024, STACK = 128 << 10, PAGE = 4096, MARGIN = 128;
constexpr u64 MAX_SHARED = 256 << 10;

struct Copy { void *to; const void *from; bool valid; int group; };
struct Thread {
  void *stack;       // saved stack pointer
  Meeting *meeting;  // the collective it waits in
  const char *file;  // the barrier it waits at
  int line, group;   // group: copies that it has committed
  std::vector<Copy> copies;
};
Thread threads[MAX_THREADS];
u32 ready[MAX_THREADS / 32], alive[MAX_THREADS / 32], meeting[MAX_THREADS / 32];
int current, num_alive, num_waiting;  // waiting at the barrier
bool reversed;

// The launch: where it returns to, what it says, what it runs.
enum Return { FAILED = 1, RETURNED };
sigjmp_buf host;
char message[1024];
void *fault;  // instruction
// A kernel of any signature: the first 6 numbers and 8 floats travel in registers, the rest on the stack, where a
// struct passed by value lies too.
struct Registers { u64 i[6]; double f[8]; } registers;
struct Stack { u64 slot[40]; } rest;
typedef void (*Kernel)(u64, u64, u64, u64, u64, u64, double, double, double, double, double, double, double, double,
                       Stack);
Kernel kernel;
unsigned char *stacks, *room, *static_shared;
u64 shared_bytes, static_bytes;

[[noreturn]] void fail(const char *format, ...) {
  int n = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z,
                   threadIdx.x);
  va_list args;
  va_start(args, format);
  vsnprintf(message + n, sizeof message - n, format, args);
  va_end(args);
  siglongjmp(host, FAILED);
}

// A place of the source, for a message; no message names more than two.
const char *place(const char *file, int line) {
  static char text[2][100];
  static int next;
  const char *slash = strrchr(file, '/');
  char *to = text[next ^= 1];
  snprintf(to, sizeof text[0], "%s:%d", slash ? slash + 1 : file, line);
  return to;
}
const char *place(const Meeting &m) { return place(m.file, m.line); }

// Fibres --------------------------------------------------------------------------------------------------------------

extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

bool is(const u32 *lanes, int thread) { return lanes[thread / 32] >> thread % 32 & 1; }

[[noreturn]] void stuck() {
  char text[700], before[200] = "", line[200];
  int n = 0;
  for (int t = 0; t < (int)blockDim.x && n < 500; t++) {  // one thread of each stretch that waits alike
    if (!is(alive, t)) continue;
    const Meeting *m = threads[t].meeting;
    if (is(meeting, t)) snprintf(line, sizeof line, "in a warp collective of lanes %08x at %s", m->mask, place(*m));
    else snprintf(line, sizeof line, "at __syncthreads, %s", place(threads[t].file, threads[t].line));
    if (strcmp(line, before)) n += snprintf(text + n, sizeof text - n, "; thread %d %s", t, line);
    strcpy(before, line);
  }
  fail("the block is stuck, %d of %u threads have returned%s", (int)blockDim.x - num_alive, blockDim.x, text);
}

int bit(u32 mask) { return reversed ? 31 - __builtin_clz(mask) : __builtin_ctz(mask); }

// Goes on with a fibre that can run: of the same warp if there is one.
void go_on() {
  int warps = (blockDim.x + 31) / 32, warp = current / 32;
  for (int i = 0; i < warps; i++) {
    if (ready[warp]) {
      int self = current, next = warp * 32 + bit(ready[warp]);
      if (next == self) return;
      current = next;
      threadIdx.x = next;
      emulator_switch(&threads[self].stack, threads[next].stack);
      return;
    }
    warp = reversed ? (warp ? warp - 1 : warps - 1) : (warp + 1 < warps ? warp + 1 : 0);
  }
  stuck();
}

void open_barrier() {
  Thread *first = nullptr;
  for (int t = 0; t < (int)blockDim.x; t++)
    if (is(alive, t)) {
      Thread &other = threads[t];
      if (!first) first = &other;
      else if (other.line != first->line || strcmp(other.file, first->file))
        fail("threads %d and %d meet at different __syncthreads: %s and %s", (int)(first - threads), t,
             place(first->file, first->line), place(other.file, other.line));
    }
  num_waiting = 0;
  for (int w = 0; w < (int)(blockDim.x + 31) / 32; w++) ready[w] = alive[w];
}

void start() {
  const u64 *i = registers.i;
  const double *f = registers.f;
  kernel(i[0], i[1], i[2], i[3], i[4], i[5], f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], rest);
  u32 self = 1u << current % 32;
  alive[current / 32] &= ~self;
  ready[current / 32] &= ~self;
  if (--num_alive == 0) siglongjmp(host, RETURNED);
  if (num_waiting == num_alive) open_barrier();
  go_on();
  __builtin_unreachable();
}

// Collectives ---------------------------------------------------------------------------------------------------------

bool in(const void *p, u64 n, const unsigned char *start, u64 size) {
  return (const unsigned char *)p >= start && (const unsigned char *)p + n <= start + size;
}
bool is_shared(const void *p, u64 n) {
  return in(p, n, dynamic_shared, shared_bytes) || in(p, n, static_shared, static_bytes);
}

float low(u32 pair) { return __uint_as_float(pair << 16); }
float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// m16n8k16: lane 4 g + t holds rows g and g + 8 of a and d, columns 2 t, 2 t + 1 (and + 8 of a), and column g of b.
void multiply(Thread *lane) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) {
    const Meeting &m = *lane[l].meeting;
    int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 4; i++) {
      a[g + i % 2 * 8][t + i / 2 * 8] = low(m.a[i]);
      a[g + i % 2 * 8][t + i / 2 * 8 + 1] = high(m.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      b[t + i * 8][g] = low(i ? m.b1 : m.b0);
      b[t + i * 8 + 1][g] = high(i ? m.b1 : m.b0);
    }
  }
  for (int row = 0; row < 16; row++) {
    float sum[8] = {0};
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
    for (int n = 0; n < 8; n++) lane[row % 8 * 4 + n / 2].meeting->d[row / 8 * 2 + n % 2] += sum[n];
  }
}

// Four tiles of 8 rows of 8: lane 8 i + j names row j of tile i, lane 4 g + t gets columns 2 t, 2 t + 1 of row g (or of
// the transposed tile's).
void load_tiles(Thread *lane, bool transposed) {
  uint16_t tile[4][8][8];
  for (int l = 0; l < 32; l++) {
    const void *row = lane[l].meeting->row;
    if ((u64)row % 16 || !is_shared(row, 16))
      fail("lane %d's row at %s is not 16 aligned bytes of shared memory", l, place(*lane[l].meeting));
    memcpy(tile[l / 8][l % 8], row, 16);
  }
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      int g = l / 4, t = l % 4 * 2;
      uint16_t one = transposed ? tile[i][t][g] : tile[i][g][t];
      uint16_t two = transposed ? tile[i][t + 1][g] : tile[i][g][t + 1];
      lane[l].meeting->r[i] = one | (u32)two << 16;
    }
}

void finish(Thread *lane, u32 mask) {
  const Meeting &first = *lane[__builtin_ctz(mask)].meeting;
  u64 before[32], votes = 0;
  for (u32 left = mask; left; left &= left - 1) {
    int l = __builtin_ctz(left);
    const Meeting &m = *lane[l].meeting;
    if (m.kind != first.kind || m.mask != first.mask || m.line != first.line || strcmp(m.file, first.file))
      fail("lanes of a warp meet at different collectives: %s (lanes %08x) and %s (lanes %08x)", place(first),
           first.mask, place(m), m.mask);
    before[l] = m.value;
    if (m.kind == BALLOT) votes |= m.value << l;
  }
  if (first.kind == LOAD_MATRIX) load_tiles(lane, false);
  if (first.kind == LOAD_MATRIX_TRANSPOSED) load_tiles(lane, true);
  if (first.kind == MMA) multiply(lane);
  for (u32 left = mask; left; left &= left - 1) {
    int l = __builtin_ctz(left);
    Meeting &m = *lane[l].meeting;
    if (m.kind == BALLOT) m.value = votes;
    if (m.kind == SHUFFLE) {
      if (!(mask >> m.from & 1))
        fail("lane %d takes a value from lane %d, outside of the mask %08x, at %s", l, m.from, mask, place(m));
      m.value = before[m.from];
    }
    lane[l].meeting = nullptr;
  }
}

// Launch --------------------------------------------------------------------------------------------------------------

void arrive(const Copy &c) {
  if (c.valid) memcpy(c.to, c.from, 16);
  else memset(c.to, 0, 16);
}

void stopped(int number, siginfo_t *info, void *context) {
  fault = (void *)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
  unsigned char *at = (unsigned char *)info->si_addr;
  if (number == SIGILL) fail("an index is outside of its array, or an access misaligned, or a divisor 0");
  if (number == SIGFPE) fail("division by zero");
  if (in(at, 1, room, MAX_SHARED + 2 * PAGE))
    fail("access outside of dynamic shared memory, at byte %ld of %lu", (long)(at - dynamic_shared), shared_bytes);
  if (in(at, 1, stacks, (u64)MAX_THREADS * STACK)) fail("the local variables need more than %d bytes", STACK);
  fail("access to memory that is not there, %p", at);
}

unsigned char *reserve(u64 size) {
  void *p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (unsigned char *)p;
}

void check_margins() {
  const unsigned char *end = dynamic_shared + shared_bytes;
  for (const unsigned char *p = dynamic_shared - MARGIN; p < dynamic_shared; p++)
    if (*p != 0xff) fail("some thread wrote before dynamic shared memory");
  for (const unsigned char *p = end; p < room + PAGE + MAX_SHARED; p++)
    if (*p != 0xff) fail("some thread wrote after the end of dynamic shared memory, %lu bytes", shared_bytes);
}

bool run_block() {
  switch (sigsetjmp(host, 0)) {
    case FAILED: return false;
    case RETURNED:  // the last thread; failing from here on comes back above
      check_margins();
      return true;
  }
  int n = blockDim.x;
  memset(dynamic_shared - MARGIN, 0xff, room + PAGE + MAX_SHARED - dynamic_shared + MARGIN);
  memset(static_shared, 0xff, static_bytes);
  num_alive = n;
  num_waiting = 0;
  for (int w = 0; w < (n + 31) / 32; w++) {
    alive[w] = ready[w] = w * 32 + 32 <= n ? ~0u : (1u << n % 32) - 1;
    meeting[w] = 0;
  }
  for (int t = 0; t < n; t++) {
    void **top = (void **)(stacks + (u64)(t + 1) * STACK - t % 16 * 64) - 2;  // not all in the same cache sets
    *top = (void *)start;
    threads[t].stack = top - 6;
    threads[t].meeting = nullptr;
    threads[t].group = 0;
    threads[t].copies.clear();
  }
  current = reversed ? n - 1 : 0;
  threadIdx = {(unsigned)current, 0, 0};
  void *here;
  emulator_switch(&here, threads[current].stack);
  return false;  // never: threads leave by a jump
}
}  // namespace

void emulator::barrier(const char *file, int line) {
  Thread &self = threads[current];
  self.file = file;
  self.line = line;
  ready[current / 32] &= ~(1u << current % 32);
  if (++num_waiting == num_alive) open_barrier();
  go_on();
}

void emulator::meet(Meeting &m) {
  int warp = current / 32, lane = current % 32;
  if (!(m.mask >> lane & 1)) fail("lane %d calls a collective of lanes %08x at %s", lane, m.mask, place(m));
  if (u32 gone = m.mask & ~alive[warp])
    fail("a collective of lanes %08x at %s, but lanes %08x have returned or never were", m.mask, place(m), gone);
  threads[current].meeting = &m;
  meeting[warp] |= 1u << lane;
  ready[warp] &= ~(1u << lane);
  if ((meeting[warp] & m.mask) == m.mask) {
    finish(threads + warp * 32, m.mask);
    meeting[warp] &= ~m.mask;
    ready[warp] |= m.mask;
  }
  go_on();
}

void emulator::copy(void *shared, const void *global, bool valid, const char *file, int line) {
  if ((u64)shared % 16 || !is_shared(shared, 16))
    fail("the target of a copy at %s is not 16 aligned bytes of shared memory", place(file, line));
  if ((u64)global % 16 || is_shared(global, 1))
    fail("the source of a copy at %s is not 16 aligned bytes of global memory", place(file, line));
  Copy c = {shared, global, valid, threads[current].group};
  if (reversed) arrive(c);
  else threads[current].copies.push_back(c);
}

void emulator::commit() { threads[current].group++; }

void emulator::wait(int pending) {
  Thread &self = threads[current];
  size_t done = 0;
  while (done < self.copies.size() && self.copies[done].group < self.group - pending) arrive(self.copies[done++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

// Runs a grid. `slots` are the arguments, 8 bytes each; bit i of `floats` says that slot i is a float. Returns a
// message, or null; *at is the instruction that the processor stopped, or null.
extern "C" __attribute__((visibility("default"))) const char *emulator_launch(
    void *entry, const u64 *slots, int num_slots, u64 floats, const unsigned *grid, unsigned block, u64 shared,
    unsigned char *static_start, u64 static_size, int backwards, void **at) {
  if (!stacks) {
    stacks = reserve((u64)MAX_THREADS * STACK);
    room = reserve(MAX_SHARED + 2 * PAGE);
    if (!stacks || !room) return "no memory for the stacks";
    for (int t = 0; t < MAX_THREADS; t++) mprotect(stacks + (u64)t * STACK, PAGE, PROT_NONE);
    mprotect(room, PAGE, PROT_NONE);
    mprotect(room + PAGE + MAX_SHARED, PAGE, PROT_NONE);
  }
  int ints = 0, reals = 0, more = 0;
  registers = {};
  rest = {};
  for (int i = 0; i < num_slots; i++) {
    bool real = floats >> i & 1;
    if (real && reals < 8) memcpy(&registers.f[reals++], &slots[i], 8);
    else if (!real && ints < 6) registers.i[ints++] = slots[i];
    else if (more < 40) rest.slot[more++] = slots[i];
    else return "too many arguments";
  }
  kernel = (Kernel)entry;
  reversed = backwards;
  static_shared = static_start;
  static_bytes = static_size;
  shared_bytes = shared;
  dynamic_shared = room + PAGE + MAX_SHARED - (shared + 127) / 128 * 128;
  blockDim = {block, 1, 1};
  gridDim = {grid[0], grid[1], grid[2]};
  fault = nullptr;

  static unsigned char signal_stack[64 << 10];
  stack_t alternate = {signal_stack, 0, sizeof signal_stack}, old_stack;
  sigaltstack(&alternate, &old_stack);
  const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction ours = {}, old[4];
  ours.sa_sigaction = stopped;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(numbers[i], &ours, &old[i]);

  const u64 blocks = (u64)grid[0] * grid[1] * grid[2];
  bool good = true;
  for (u64 i = 0; i < blocks && good; i++) {
    u64 b = reversed ? blocks - 1 - i : i;
    blockIdx = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / grid[0] / grid[1])};
    good = run_block();
  }
  for (int i = 0; i < 4; i++) sigaction(numbers[i], &old[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  *at = fault;
  return good ? nullptr : message;
}
