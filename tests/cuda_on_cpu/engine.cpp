// How do the threads of a launch run? The scheduler of their fibers, and the barriers behind engine.h.
#include "scheduler.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

// The linker's names for the section that holds every static __shared__ array (see shim.py); absent when there is none.
extern "C" {
extern unsigned char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

namespace cuda_on_cpu {

Now now;
uint64_t order = 0;
std::string grid_barriers;

namespace {

constexpr int kWarp = 32;

// ---- what runs ------------------------------------------------------------------------------------------------------
enum class State { kReady, kBlockBarrier, kWarpOperation, kGridBarrier, kLooking, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Thread {
  Context context;
  State state = State::kReady;
  Site site{};
  uint3 index{};
  unsigned char* stack = nullptr;
  int warp = 0, value = 0, group = 0;
  unsigned mask = 0;
  void* mine = nullptr;
  std::vector<Copy> copies;
  void* fake_stack = nullptr;
};

// The lanes that wait at a warp operation. While all have the same mask and stand at the same place, one comparison does.
struct Warp {
  unsigned waiting = 0, mask = 0;
  Site site{};
  bool alike = true;
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  std::vector<unsigned char> saved_static;
  int done = 0, at_barrier = 0, at_grid_barrier = 0, looking = 0;
  Site barrier{};  // the one that at_barrier threads stand at
};

constexpr int kPatience = 100;
uint64_t steps = 0;  // counts what threads do that is more than to look

Block* block = nullptr;
Thread* thread = nullptr;
Context scheduler;
Body body = nullptr;
const void* body_context = nullptr;

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.what == b.what || strcmp(a.what, b.what) == 0);
}

std::string place(const Site& site) {
  const char* name = strrchr(site.file, '/');
  return std::string(site.what) + " (" + (name ? name + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

// ---- switching ------------------------------------------------------------------------------------------------------
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

void back_to_scheduler(bool for_good) {
  begin_switch(for_good ? nullptr : &thread->fake_stack, scheduler_stack, scheduler_stack_size);
  Thread* me = thread;
  jump(me->context, scheduler);
  end_switch(me->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void enter() {
  end_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  body(body_context);
  thread->state = State::kDone;
  if (!thread->copies.empty()) async_wait(0);
  ++block->done;
  ++steps;
  back_to_scheduler(true);
  abort();  // a finished fiber is never resumed
}

void run(Thread& t) {
  thread = &t;
  now.thread = t.index;
  begin_switch(&scheduler_fake_stack, t.stack, kStack);
  jump(scheduler, t.context);
  end_switch(scheduler_fake_stack, nullptr, nullptr);
}

void wait(State state, Site site) {
  steps += state != State::kLooking;
  thread->state = state;
  thread->site = site;
  back_to_scheduler(false);
}

// ---- scheduling -----------------------------------------------------------------------------------------------------
// 0: every thread goes on to its next barrier or warp operation in turn. 1: the last warp first, as far as it gets, its
// last lane first. Others are seeds: warps and lanes shuffled in each round.
struct Order {
  std::vector<int> warps, lanes;
  bool far = false;
  std::mt19937_64 random{order};

  Order(int warp_count) {
    for (int w = 0; w < warp_count; ++w) warps.push_back(order == 1 ? warp_count - 1 - w : w);
    for (int l = 0; l < kWarp; ++l) lanes.push_back(order == 1 ? kWarp - 1 - l : l);
    far = order == 1;
  }
  void next_round() {
    if (order < 2) return;
    for (auto* v : {&warps, &lanes})
      for (size_t i = v->size(); i > 1; --i) std::swap((*v)[i - 1], (*v)[random() % i]);
    far = random() % 2;
  }
};

std::string waiting() {
  std::string out;
  std::map<std::string, std::pair<int, int>> groups;  // place -> how many, first thread
  for (size_t i = 0; i < block->threads.size(); ++i) {
    const Thread& t = block->threads[i];
    const std::string where = t.state == State::kDone ? "have returned" : "wait at " + place(t.site);
    auto [it, fresh] = groups.insert({where, {0, (int)i}});
    (void)fresh;
    ++it->second.first;
  }
  for (auto& [where, threads] : groups)
    out += (out.empty() ? "" : "; ") + std::to_string(threads.first) + " threads (first " +
           std::to_string(threads.second) + ") " + where;
  return out;
}

// Runs the block until every thread has returned or stands at a grid barrier, or none can go on before another block writes.
void run_block(Block& b, Order& how) {
  block = &b;
  now.block = b.index;
  now.dynamic_shared = b.dynamic_shared.get();
  const int count = (int)b.threads.size();
  while (!failed) {
    bool progress = false;
    how.next_round();
    for (int w : how.warps) {
      bool ran;
      do {
        ran = false;
        for (int l : how.lanes) {
          const int i = w * kWarp + l;
          if (i >= count || b.threads[i].state != State::kReady) continue;
          run(b.threads[i]);
          ran = progress = true;
          if (failed) return;
        }
      } while (ran && how.far);
    }
    if (progress) continue;
    if (b.done == count || b.at_grid_barrier == count || b.looking) return;
    return fail("divergent barrier in block " + text(b.index) + ": " + waiting());
  }
}

void poison_static_shared() {
  if (kSanitized) return;  // its red zones may not be written; the other build does it
  if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
}

// Red zones too: volatile, or the compiler makes memcpy of it, which AddressSanitizer watches. In large pieces: the kernels'
// arrays are 700 KB, and every block of a cooperative launch gets its own in each round.
typedef unsigned char Piece __attribute__((vector_size(64), aligned(1), may_alias));
__attribute__((no_sanitize("address"))) void copy_bytes(unsigned char* to, const unsigned char* from, size_t bytes) {
  const size_t pieces = bytes / sizeof(Piece);
  for (size_t i = 0; i < pieces; ++i) ((volatile Piece*)to)[i] = ((const volatile Piece*)from)[i];
  for (size_t i = pieces * sizeof(Piece); i < bytes; ++i) ((volatile unsigned char*)to)[i] = from[i];
}

size_t static_shared_bytes() { return __start_cuda_shared ? __stop_cuda_shared - __start_cuda_shared : 0; }

void start_block(Block& b, uint3 index, dim3 dim, size_t shared, size_t first_stack) {
  b.index = index;
  b.done = b.at_barrier = b.at_grid_barrier = b.looking = 0;
  const size_t count = (size_t)dim.x * dim.y * dim.z;
  if (!b.dynamic_shared) b.dynamic_shared.reset(new unsigned char[shared + 1]);
  memset(b.dynamic_shared.get(), 0xff, shared);
  b.threads.resize(count);
  b.warps.assign((count + kWarp - 1) / kWarp, {});
  for (size_t i = 0; i < count; ++i) {
    Thread& t = b.threads[i];
    t.state = State::kReady;
    t.index = {(unsigned)(i % dim.x), (unsigned)(i / dim.x % dim.y), (unsigned)(i / dim.x / dim.y)};
    t.warp = (int)(i / kWarp);
    t.group = 0;
    t.copies.clear();
    t.stack = stack_of(first_stack + i);
    forget_frames(t.stack + kStack - kGuard, kGuard);  // enter() never returns
    prepare(t.context, t.stack, enter);
  }
}

uint3 block_index(uint64_t i, dim3 grid) {
  return {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
}

void run_one_by_one(dim3 grid, dim3 dim, size_t shared) {
  const uint64_t count = (uint64_t)grid.x * grid.y * grid.z;
  Order how((dim.x * dim.y * dim.z + kWarp - 1) / kWarp);
  Block b;
  const uint64_t half = (count + 1) / 2;
  for (uint64_t i = 0; i < count && !failed; ++i) {
    const uint64_t even_first = i < half ? 2 * i : 2 * (i - half) + 1;
    const uint64_t at = order == 0 ? i : order == 1 ? count - 1 - i : even_first;
    start_block(b, block_index(at, grid), dim, shared, 0);
    poison_static_shared();
    run_block(b, how);
    if (!failed && b.at_grid_barrier) fail("grid barrier in a launch that is not cooperative: " + waiting());
    if (!failed && b.looking) fail("a wait for another block in a launch that is not cooperative: " + waiting());
  }
}

void run_together(dim3 grid, dim3 dim, size_t shared) {
  const uint64_t count = (uint64_t)grid.x * grid.y * grid.z;
  const size_t threads = (size_t)dim.x * dim.y * dim.z;
  Order how((threads + kWarp - 1) / kWarp);
  std::vector<Block> blocks(count);
  grid_barriers.clear();
  poison_static_shared();
  for (uint64_t i = 0; i < count; ++i) {
    start_block(blocks[i], block_index(i, grid), dim, shared, i * threads);
    blocks[i].saved_static.resize(static_shared_bytes());
    copy_bytes(blocks[i].saved_static.data(), __start_cuda_shared, static_shared_bytes());
  }
  int idle = 0;  // rounds in which no thread did more than look
  for (uint64_t returned = 0; returned < count && !failed;) {
    uint64_t arrived = 0, looking = 0;
    const uint64_t before = steps;
    returned = 0;
    for (uint64_t i = 0; i < count && !failed; ++i) {
      Block& b = blocks[order == 1 ? count - 1 - i : i];
      if (b.done < (int)threads) {
        copy_bytes(__start_cuda_shared, b.saved_static.data(), static_shared_bytes());
        b.looking = 0;
        for (Thread& t : b.threads)
          if (t.state == State::kLooking) t.state = State::kReady;
        run_block(b, how);
        copy_bytes(b.saved_static.data(), __start_cuda_shared, static_shared_bytes());
      }
      returned += b.done == (int)threads;
      arrived += b.at_grid_barrier == (int)threads;
      looking += b.looking > 0;
    }
    if (failed || returned == count) return;
    if (looking) {
      idle = steps == before ? idle + 1 : 0;
      if (idle > kPatience) return block = &blocks[0], fail("what a thread looks for is never written: " + waiting());
      continue;
    }
    if (arrived < count)
      return fail("divergent grid barrier: " + std::to_string(arrived) + " of " + std::to_string(count) + " blocks are there");
    const char* name = blocks[0].threads[0].site.what;
    grid_barriers += std::string(name) + "\n";
    for (Block& b : blocks) {
      b.at_grid_barrier = 0;
      for (Thread& t : b.threads) {
        if (strcmp(t.site.what, name) != 0)
          return fail("divergent grid barrier: threads are at " + std::string(name) + " and at " + t.site.what);
        t.state = State::kReady;
      }
    }
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 dim, size_t shared, bool cooperative, Body run_body, const void* context) {
  now.block_dim = dim;
  now.grid_dim = grid;
  body = run_body;
  body_context = context;
  if (cooperative) run_together(grid, dim, shared);
  else run_one_by_one(grid, dim, shared);
  if (!failed) return;
  for (unsigned char* stack : stacks) forget_frames(stack, kStack);  // of fibers that the failure left in the middle
}

// ---- what kernels call --------------------------------------------------------------------------------
int block_barrier(Site site, int value) {
  Block& b = *block;
  if (b.at_barrier == 0) b.barrier = site;
  if (!same(b.barrier, site)) broken(site, ("divergent barrier: another thread is at " + place(b.barrier)).c_str());
  Thread* me = thread;
  me->value = value;
  if (++b.at_barrier == (int)b.threads.size()) {
    int sum = 0;
    for (Thread& t : b.threads) sum += t.value;
    for (Thread& t : b.threads) t.state = State::kReady, t.value = sum;
    b.at_barrier = 0;
    back_to_scheduler(false);
  } else {
    wait(State::kBlockBarrier, site);
  }
  return me->value;
}

void look_again(Site site) {
  ++block->looking;
  wait(State::kLooking, site);
}

void grid_barrier(Site site) {
  ++block->at_grid_barrier;
  wait(State::kGridBarrier, site);
}

unsigned lane() {
  const uint3 t = now.thread;
  return (t.x + now.block_dim.x * (t.y + now.block_dim.y * t.z)) % kWarp;
}

void warp_operation(Site site, unsigned mask, void* mine, Apply apply) {
  Thread* me = thread;
  Warp& warp = block->warps[me->warp];
  Thread* const lanes_of = block->threads.data() + (size_t)me->warp * kWarp;
  const size_t count = block->threads.data() + block->threads.size() - lanes_of;
  const unsigned own = 1u << (me - lanes_of);
  if (!(mask & own)) broken(site, "the lane is not in its own mask");
  if (count < (size_t)kWarp && mask >> count) broken(site, "the mask names lanes that the block does not have");
  me->mask = mask;
  me->mine = mine;
  me->site = site;
  me->state = State::kWarpOperation;
  if (!warp.waiting) warp = {0, mask, site, true};
  warp.alike = warp.alike && warp.mask == mask && same(warp.site, site);
  for (int l = 0; l < kWarp && !warp.alike; ++l) {
    const Thread& t = lanes_of[l];
    if ((warp.waiting & mask) >> l & 1 && (t.mask != mask || !same(t.site, site)))
      broken(site, ("divergent warp operation: another lane is at " + place(t.site)).c_str());
  }
  warp.waiting |= own;
  if ((warp.waiting & mask) == mask) {
    void* lanes[kWarp] = {};
    for (int l = 0; l < kWarp; ++l)
      if (mask >> l & 1) lanes[l] = lanes_of[l].mine;
    apply(lanes);
    for (int l = 0; l < kWarp; ++l)
      if (mask >> l & 1) lanes_of[l].state = State::kReady;
    warp.waiting &= ~mask;
  }
  back_to_scheduler(false);
}

void broken(Site site, const char* rule) {
  fail(place(site) + ", thread " + text(thread->index) + " of block " + text(block->index) + ": " + rule);
  back_to_scheduler(false);
  abort();  // an abandoned fiber is never resumed
}

void async_copy(void* to, const void* from, size_t bytes) {
  if ((uintptr_t)to % 16 || (bytes && (uintptr_t)from % 16)) broken({"cp.async", "", 0}, "not aligned to 16 bytes");
  memset(to, 0xff, 16);
  thread->copies.push_back({to, from, bytes, thread->group});
}
void async_commit() { ++thread->group; }
void async_wait(int newest_left) {
  std::vector<Copy>& copies = thread->copies;
  size_t left = 0;
  for (const Copy c : copies) {
    if (c.group >= thread->group - newest_left) {
      copies[left++] = c;
      continue;
    }
    memset(c.to, 0, 16);
    if (c.bytes) memcpy(c.to, c.from, c.bytes);
  }
  copies.resize(left);
}

}  // namespace cuda_on_cpu
