// Whether the runtime keeps the promises that the tests of the CUDA kernels rely on: what works,
// what is late or poisoned so that bugs show, and one kernel for every misuse.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/primitives.h"
#include "tests/check.h"
#include "tests/cuda_on_cpu/runtime.h"

namespace {

using namespace kdk::gpu;
using Kernel = std::function<void()>;

float shuffled(float value, int mask) {
  const float values[1] = {value};
  float received[1];
  shuffle_xor(values, mask, received);
  return received[0];
}

constexpr std::uint64_t kSeeds = 9;
constexpr Launch kWarpOnly = {1, 1, 32, 1024};
constexpr Launch kOneBlock = {1, 1, 64, 1024};
constexpr Launch kTwoBlocks = {1, 2, 64, 1024};

struct alignas(16) Floats {
  float at[64];
};

// The shared memory of the kernels below.
struct Shared {
  Floats data;
  Floats more;
  Barrier barriers[2];
};

Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory()); }

Floats counted(float first) {
  Floats floats;
  std::iota(floats.at, floats.at + 64, first);
  return floats;
}

std::string error_of(const Launch& shape, const Kernel& kernel) {
  try {
    launch(shape, kernel);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool fails(const Launch& shape, const std::string& message, const Kernel& kernel) {
  const std::string error = error_of(shape, kernel);
  if (error.find(message) != std::string::npos) return true;
  std::fprintf(stderr, "expected \"%s\", got \"%s\"\n", message.c_str(), error.c_str());
  return false;
}

bool first_thread() { return thread_rank() == 0; }

void init_barriers() {
  if (first_thread()) {
    barrier_init(&shared().barriers[0]);
    barrier_init(&shared().barriers[1]);
  }
  sync_block();
}

void fenced_sync() {
  fence_async();
  sync_block();
}

// ---- Threads, blocks and clusters -------------------------------------------------------------

void test_places() {
  std::vector<int> seen;
  launch({3, 2, 64, 0}, [&] {
    CHECK(block_threads() == 64 && cluster_blocks() == 2 && grid_blocks() == 6);
    seen.push_back(block_index() * 64 + thread_rank());
  });
  std::vector<int> in_order(3 * 2 * 64);
  std::iota(in_order.begin(), in_order.end(), 0);
  CHECK(seen == in_order);
}

void test_shared_memory_starts_poisoned() {
  bool poisoned = true;
  std::vector<char*> memories;
  launch({2, 2, 32, 1000}, [&] {
    if (!first_thread()) return;
    const char* memory = shared_memory();
    poisoned &= std::all_of(memory, memory + 1000, [](char byte) { return byte == '\xff'; });
    poisoned &= std::isnan(shared().data.at[0]);
    std::fill_n(shared_memory(), 1000, '\0');
    CHECK(reinterpret_cast<std::uintptr_t>(memory) % 128 == 0);
    if (block_index() < cluster_blocks()) memories.push_back(shared_memory());
  });
  CHECK(poisoned);
  CHECK(memories.size() == 2 && memories[0] != memories[1]);
}

void test_syncs_and_exchanges() {
  constexpr int kBlocks = 4;
  constexpr int kThreads = 128;
  bool right = true;
  launch({2, kBlocks, kThreads, 64 * sizeof(float)}, [&] {
    float* sums = shared().data.at;
    float value = static_cast<float>(block_rank() * kThreads + thread_rank());
    for (int mask = 16; mask > 0; mask /= 2) value += shuffled(value, mask);
    if (thread_rank() % 32 == 0) sums[thread_rank() / 32] = value;
    sync_block();
    if (first_thread()) sums[32] = sums[0] + sums[1] + sums[2] + sums[3];
    sync_cluster();
    float total = 0;
    for (int rank = 0; rank < kBlocks; ++rank) total += load_remote(&sums[32], rank);
    right &= total == kBlocks * kThreads * (kBlocks * kThreads - 1) / 2;
    sync_cluster();
  });
  CHECK(right);
}

void test_blocks_meet_in_memory() {
  constexpr int kRounds = 5;
  std::uint32_t arrivals = 0xffffffffu - 3;  // it may wrap around
  float slots[2] = {0, 0};
  bool right = true;
  launch(kTwoBlocks, [&] {
    std::uint32_t awaited = 0xffffffffu - 3;
    for (int round = 1; round <= kRounds; ++round) {
      awaited += 2;
      if (first_thread()) {
        slots[block_rank()] = static_cast<float>(round);
        memory_arrive(&arrivals);
        memory_await(&arrivals, awaited);
        right &= load_from_block(&slots[1 - block_rank()]) == static_cast<float>(round);
      }
      sync_cluster();  // nobody writes what another one has yet to read
    }
  });
  CHECK(right);
  CHECK(arrivals == 0xffffffffu - 3 + 2 * kRounds);
}

void test_shuffle_reaches_every_lane() {
  bool right = true;
  launch(kOneBlock, [&] {
    for (int mask = 0; mask < 32; ++mask) {
      right &= shuffled(static_cast<float>(thread_rank()), mask) ==
               static_cast<float>(thread_rank() ^ mask);
    }
  });
  CHECK(right);
}

std::vector<int> order_of(std::uint64_t seed) {
  std::vector<int> order;
  set_schedule(seed);
  launch(kTwoBlocks, [&] {
    order.push_back(thread_rank());
    sync_block();
    order.push_back(thread_rank());
  });
  set_schedule(0);
  return order;
}

void test_schedules() {
  CHECK(order_of(0)[0] == 0 && order_of(0)[63] == 63 && order_of(0)[128] == 0);
  for (std::uint64_t seed = 1; seed < kSeeds; ++seed) {
    CHECK(order_of(seed) == order_of(seed));
    CHECK(order_of(seed) != order_of(seed - 1));
  }
}

// By how many rounds one block gets ahead of the other.
int lead_of_a_block(std::uint64_t seed) {
  int rounds[2] = {};
  int lead = 0;
  set_schedule(seed);
  launch(kTwoBlocks, [&] {
    for (int round = 0; round < 8; ++round) {
      sync_block();
      if (!first_thread()) continue;
      ++rounds[block_rank()];
      lead = std::max(lead, std::abs(rounds[0] - rounds[1]));
    }
  });
  set_schedule(0);
  return lead;
}

void test_temperaments() {
  CHECK(lead_of_a_block(0) == 1);
  CHECK(lead_of_a_block(3) == 8);
  CHECK(lead_of_a_block(4) <= 2);
}

// Every thread overwrites what its neighbour may still have to read.
float race(std::uint64_t seed) {
  float sum = 0;
  set_schedule(seed);
  launch(kWarpOnly, [&] {
    shared().data.at[thread_rank()] = 1;
    sync_block();
    const float value = shared().data.at[(thread_rank() + 1) % 32];
    shared().data.at[thread_rank()] = 100;
    sum += value;
  });
  set_schedule(0);
  return sum;
}

void test_schedules_show_races() {
  bool differs = false;
  for (std::uint64_t seed = 1; seed < kSeeds; ++seed) differs |= race(seed) != race(0);
  CHECK(differs);
}

// ---- Bulk copies that are right ---------------------------------------------------------------

// Tiles arrive alternately in two buffers while the other one is doubled and sent back.
void pipeline(const std::vector<Floats>& in, std::vector<Floats>& out) {
  const int tiles = static_cast<int>(in.size());
  Floats* buffers[] = {&shared().data, &shared().more};
  init_barriers();
  const auto load = [&](int tile) {
    Barrier* barrier = &shared().barriers[tile % 2];
    barrier_expect(barrier, sizeof(Floats));
    bulk_load(buffers[tile % 2], &in[tile], sizeof(Floats), barrier);
  };
  if (first_thread()) load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (first_thread() && tile + 1 < tiles) {
      bulk_wait_read();
      load(tile + 1);
    }
    barrier_wait(&shared().barriers[tile % 2], tile / 2 % 2);
    buffers[tile % 2]->at[thread_rank()] *= 2;
    fenced_sync();
    if (first_thread()) bulk_store(&out[tile], buffers[tile % 2], sizeof(Floats));
  }
  if (first_thread()) bulk_wait_read();
}

void test_pipeline() {
  std::vector<Floats> in;
  for (int tile = 0; tile < 7; ++tile) in.push_back(counted(static_cast<float>(64 * tile)));
  std::vector<Floats> out(in.size());
  launch(kOneBlock, [&] { pipeline(in, out); });
  bool right = true;
  for (int i = 0; i < 7 * 64; ++i) right &= out[i / 64].at[i % 64] == static_cast<float>(2 * i);
  CHECK(right);
}

void test_load_is_late() {
  Floats in = counted(0);
  bool right = true;
  launch(kOneBlock, [&] {
    Shared& mine = shared();
    init_barriers();
    if (first_thread()) {
      mine.data.at[0] = 5;
      barrier_expect(&mine.barriers[0], 16);
      bulk_load(&mine.data, &in, 16, &mine.barriers[0]);
      in.at[0] = 7;
    }
    sync_block();
    CHECK(first_thread() == false || std::isnan(mine.data.at[0]));
    sync_block();
    barrier_wait(&mine.barriers[0], 0);
    right &= mine.data.at[0] == 7 && mine.data.at[3] == 3;
  });
  CHECK(right);
}

void test_store_is_late() {
  Floats out = counted(0);
  launch(kOneBlock, [&] {
    Shared& mine = shared();
    mine.data.at[thread_rank()] = 1;
    fenced_sync();
    if (!first_thread()) return;
    bulk_store(&out, &mine.data, sizeof(Floats));
    CHECK(out.at[1] == 1 && out.at[2] == 2);
    mine.data.at[2] = 9;
    bulk_wait_read();
    CHECK(out.at[1] == 1 && out.at[2] == 9);
  });
}

// The waiting threads come first, the arrival and the two loads of the phase afterwards.
void test_waiting_for_a_later_issue() {
  const Floats in = counted(0);
  bool right = true;
  launch(kOneBlock, [&] {
    Shared& mine = shared();
    init_barriers();
    if (thread_rank() == 63) {
      bulk_load(&mine.data, &in, 128, &mine.barriers[0]);
      barrier_expect(&mine.barriers[0], sizeof(Floats));
      bulk_load(&mine.data.at[32], &in.at[32], 128, &mine.barriers[0]);
    }
    barrier_wait(&mine.barriers[0], 0);
    right &= mine.data.at[thread_rank()] == static_cast<float>(thread_rank());
  });
  CHECK(right);
}

void test_parity_of_a_fresh_barrier() {
  CHECK(error_of(kWarpOnly, [] {
          init_barriers();
          barrier_wait(&shared().barriers[0], 1);
        }) == "");
  CHECK(fails(kWarpOnly, "deadlock: block 0: 32 at barrier_wait (cluster 0)", [] {
    init_barriers();
    barrier_wait(&shared().barriers[0], 0);
  }));
}

// A phase that nobody saw: its parity is that of the phase to come.
void test_missed_phase() {
  CHECK(fails(kWarpOnly, "31 at sync_block, 1 at barrier_wait", [] {
    init_barriers();
    if (first_thread()) {
      for (int parity = 0; parity < 2; ++parity) {
        barrier_expect(&shared().barriers[0], 0);
        barrier_wait(&shared().barriers[0], parity);
      }
      barrier_wait(&shared().barriers[0], 0);
    }
    sync_block();
  }));
}

// ---- Misuse of barriers and exchanges ---------------------------------------------------------

void test_sync_misuse() {
  CHECK(fails(kOneBlock,
              "sync_block: the thread returned while 5 threads of its block wait "
              "(cluster 0, block 0, thread 5)",
              [] {
                if (thread_rank() != 5) sync_block();
              }));
  CHECK(fails(kOneBlock, "sync_block: 1 threads of the block have returned", [] {
    if (!first_thread()) sync_block();
  }));
  CHECK(fails(kTwoBlocks, "sync_cluster: the thread returned while 64 threads of its cluster wait",
              [] {
                if (block_rank() == 0) sync_cluster();
              }));
  CHECK(
      fails({2, 2, 64, 0}, "sync_cluster: 64 threads of the cluster have returned (cluster 1", [] {
        if (block_index() < cluster_blocks() || block_rank() == 1) sync_cluster();
      }));
  CHECK(fails(kOneBlock, "sync_cluster: 1 threads of the block are at sync_block", [] {
    if (first_thread()) return sync_block();
    sync_cluster();
  }));
  CHECK(fails(kOneBlock, "sync_block: 1 threads of the block are at sync_cluster", [] {
    if (first_thread()) return sync_cluster();
    sync_block();
  }));
  CHECK(fails(kTwoBlocks,
              "deadlock: block 0: 64 at sync_cluster; block 1: 63 at sync_block, "
              "1 at barrier_wait (cluster 0)",
              [] {
                if (block_rank() == 0) return sync_cluster();
                init_barriers();
                if (first_thread()) barrier_wait(&shared().barriers[0], 0);
                sync_block();
              }));
}

void test_shuffle_misuse() {
  CHECK(fails(kOneBlock,
              "shuffle_xor: mask 2 and 1 values where other lanes have mask 1 and 1 values "
              "(cluster 0, block 0, "
              "thread 40)",
              [] { shuffled(0, thread_rank() == 40 ? 2 : 1); }));
  CHECK(fails(kOneBlock, "shuffle_xor: mask 32 is not in 0..31", [] { shuffled(0, 32); }));
  CHECK(fails(kWarpOnly, "deadlock: block 0: 1 at sync_block, 31 at shuffle_xor (cluster 0)", [] {
    if (thread_rank() == 7) sync_block();
    shuffled(0, 1);
  }));
  CHECK(fails(kWarpOnly, "deadlock: block 0: 1 at memory_await, 31 returned (cluster 0)", [] {
    std::uint32_t arrivals = 0;
    if (first_thread()) memory_await(&arrivals, 1);
  }));
  CHECK(fails(kWarpOnly, "deadlock: block 0: 31 at shuffle_xor, 1 returned (cluster 0)", [] {
    if (!first_thread()) shuffled(0, 1);
  }));
}

void test_load_remote_misuse() {
  CHECK(fails(kTwoBlocks, "load_remote: the cluster has no block 2",
              [] { load_remote(shared().data.at, 2); }));
  CHECK(fails(kTwoBlocks, "load_remote: the cluster has no block -1",
              [] { load_remote(shared().data.at, -1); }));
  CHECK(fails(kTwoBlocks, "load_remote: the address is not that of a float",
              [] { load_remote(reinterpret_cast<const float*>(shared_memory() + 1024), 0); }));
  CHECK(fails(kTwoBlocks,
              "load_remote: block 0 has returned, its memory is gone "
              "(cluster 0, block 1, thread 0)",
              [] {
                if (block_rank() == 1) load_remote(shared().data.at, 0);
              }));
}

void test_barrier_misuse() {
  const auto barrier = [] { return &shared().barriers[0]; };
  CHECK(fails(kWarpOnly, "barrier_wait: the barrier is not initialised",
              [&] { barrier_wait(barrier(), 0); }));
  CHECK(fails(kWarpOnly, "barrier_expect: the barrier is not initialised",
              [&] { barrier_expect(barrier(), 16); }));
  CHECK(fails(kWarpOnly,
              "barrier_init: the barrier is already initialised (cluster 0, block 0, "
              "thread 1)",
              [&] { barrier_init(barrier()); }));
  CHECK(fails(kWarpOnly, "barrier_init: the barrier is not 8 aligned bytes",
              [] { barrier_init(reinterpret_cast<Barrier*>(shared_memory() + 1020)); }));
  CHECK(fails(kWarpOnly, "barrier_wait: the barrier is not 8 aligned bytes",
              [] { barrier_wait(reinterpret_cast<Barrier*>(shared_memory() + 1024), 0); }));
  CHECK(fails(kWarpOnly, "barrier_wait: parity 2 is neither 0 nor 1", [&] {
    init_barriers();
    barrier_wait(barrier(), 2);
  }));
  CHECK(fails(kWarpOnly, "barrier_wait: the barrier has been overwritten", [&] {
    init_barriers();
    barrier()->state = 0;
    barrier_wait(barrier(), 1);
  }));
  CHECK(fails(kWarpOnly, "barrier_expect: the barrier's phase has already had its arrival", [&] {
    init_barriers();
    barrier_expect(barrier(), 16);
  }));
}

// ---- Misuse of bulk copies --------------------------------------------------------------------

// Runs `misuse` in the first thread of a block whose barriers are initialised and whose threads
// have fenced what they wrote.
bool copy_fails(const std::string& message, const std::function<void(Shared&)>& misuse) {
  return fails(kOneBlock, message, [&] {
    init_barriers();
    fenced_sync();
    if (first_thread()) misuse(shared());
  });
}

void test_copy_checks() {
  Floats global = counted(0);
  CHECK(copy_fails("bulk_load: size 24 is not a positive multiple of 16",
                   [&](Shared& mine) { bulk_load(&mine.data, &global, 24, &mine.barriers[0]); }));
  CHECK(copy_fails("bulk_load: size 0 is not a positive multiple of 16",
                   [&](Shared& mine) { bulk_load(&mine.data, &global, 0, &mine.barriers[0]); }));
  CHECK(copy_fails("bulk_load: the shared address is not 16-byte aligned", [&](Shared& mine) {
    bulk_load(&mine.data.at[1], &global, 16, &mine.barriers[0]);
  }));
  CHECK(copy_fails("bulk_load: the global address is not 16-byte aligned", [&](Shared& mine) {
    bulk_load(&mine.data, &global.at[2], 16, &mine.barriers[0]);
  }));
  CHECK(copy_fails("bulk_load: not all of the bytes lie in the block's shared", [&](Shared& mine) {
    bulk_load(shared_memory() + 1008, &global, 32, &mine.barriers[0]);
  }));
  CHECK(copy_fails("bulk_load: not all of the bytes lie in the block's shared", [&](Shared& mine) {
    bulk_load(shared_memory() - 16, &global, 32, &mine.barriers[0]);
  }));
  Barrier outside;
  CHECK(copy_fails("bulk_load: the barrier is not 8 aligned bytes",
                   [&](Shared& mine) { bulk_load(&mine.data, &global, 16, &outside); }));
  CHECK(copy_fails("bulk_store: size 8 is not a positive multiple of 16",
                   [&](Shared& mine) { bulk_store(&global, &mine.data, 8); }));
  CHECK(copy_fails("bulk_store: the global address is not 16-byte aligned",
                   [&](Shared& mine) { bulk_store(&global.at[1], &mine.data, 16); }));
  CHECK(copy_fails("bulk_store: the shared address is not 16-byte aligned",
                   [&](Shared& mine) { bulk_store(&global, &mine.data.at[1], 16); }));
  CHECK(copy_fails("bulk_store: not all of the bytes lie in the block's shared",
                   [&](Shared&) { bulk_store(&global, shared_memory() + 1024, 16); }));
}

void test_load_misuse() {
  Floats global = counted(0);
  CHECK(
      copy_fails("bulk_load: the barrier's phase gets 32 bytes and expects 16", [&](Shared& mine) {
        barrier_expect(&mine.barriers[0], 16);
        bulk_load(&mine.data, &global, 32, &mine.barriers[0]);
      }));
  CHECK(copy_fails("barrier_expect: the barrier's phase gets 32 bytes and expects 16",
                   [&](Shared& mine) {
                     bulk_load(&mine.data, &global, 32, &mine.barriers[0]);
                     barrier_expect(&mine.barriers[0], 16);
                   }));
  CHECK(copy_fails("bulk_load: the destination overlaps that of a pending bulk_load",
                   [&](Shared& mine) {
                     bulk_load(&mine.data, &global, 32, &mine.barriers[0]);
                     bulk_load(&mine.data.at[4], &global, 32, &mine.barriers[1]);
                   }));
  CHECK(copy_fails("bulk_load: the destination overlaps the source of a pending bulk_store",
                   [&](Shared& mine) {
                     bulk_store(&global, &mine.data, 32);
                     bulk_load(&mine.data.at[4], &global, 32, &mine.barriers[0]);
                   }));
  CHECK(copy_fails("bulk_load: the block returned before 1 of its loads were waited for",
                   [&](Shared& mine) {
                     barrier_expect(&mine.barriers[0], 16);
                     bulk_load(&mine.data, &global, 16, &mine.barriers[0]);
                   }));
  CHECK(copy_fails("deadlock: block 0: 1 at barrier_wait, 63 returned", [&](Shared& mine) {
    barrier_expect(&mine.barriers[0], 32);
    bulk_load(&mine.data, &global, 16, &mine.barriers[0]);
    barrier_wait(&mine.barriers[0], 0);
  }));
}

void test_store_misuse() {
  Floats global = counted(0);
  CHECK(copy_fails("bulk_store: the thread returned before bulk_wait_read",
                   [&](Shared& mine) { bulk_store(&global, &mine.data, 16); }));
  CHECK(copy_fails("bulk_store: the source overlaps the destination of a pending bulk_load",
                   [&](Shared& mine) {
                     bulk_load(&mine.data, &global, 32, &mine.barriers[0]);
                     bulk_store(&global, &mine.data.at[4], 16);
                   }));
}

void test_store_needs_the_fence_of_every_thread() {
  Floats global = counted(0);
  const auto store_after = [&](const Kernel& syncs) {
    return [&global, syncs] {
      syncs();
      if (!first_thread()) return;
      bulk_store(&global, &shared().data, 16);
      bulk_wait_read();
    };
  };
  const std::string message = "bulk_store: bulk_store without fence_async before the barrier";
  CHECK(fails(kOneBlock, message, store_after([] {})));
  CHECK(fails(kOneBlock, message, store_after([] { sync_block(); })));
  CHECK(fails(kOneBlock, message, store_after([] {
                if (thread_rank() != 17) fence_async();
                sync_block();
              })));
  CHECK(fails(kOneBlock, message, store_after([] {
                sync_block();
                fence_async();
              })));
  CHECK(fails(kTwoBlocks, message, store_after([] {
                fenced_sync();
                sync_cluster();
              })));
  CHECK(error_of(kOneBlock, store_after(fenced_sync)) == "");
  CHECK(error_of(kTwoBlocks, store_after([] {
                   fence_async();
                   fence_async();
                   sync_cluster();
                 })) == "");
}

// ---- Launches ---------------------------------------------------------------------------------

void test_launch_checks() {
  CHECK(fails({0, 1, 32, 0}, "launch: no clusters", [] {}));
  CHECK(fails({1, 17, 32, 0}, "launch: a cluster has 1 to 16 blocks", [] {}));
  CHECK(fails({1, 1, 48, 0}, "launch: a block has 32 to 1024 threads", [] {}));
  CHECK(fails(kWarpOnly, "launch: called by a kernel", [] { launch(kWarpOnly, [] {}); }));
  bool refused = false;
  try {
    sync_block();
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused);
}

void test_failure_unwinds_the_threads() {
  struct Counter {
    explicit Counter(int& count) : count(count) { ++count; }
    ~Counter() { --count; }
    int& count;
  };
  int alive = 0;
  int started = 0;
  CHECK(fails(kTwoBlocks, "is a kernel's own", [&] {
    const Counter counter(alive);
    ++started;
    if (block_rank() == 1) throw std::runtime_error("is a kernel's own");
    sync_cluster();
  }));
  CHECK(started == 65 && alive == 0);
}

void test_overrun_is_found() {
#ifndef __SANITIZE_ADDRESS__
  CHECK(fails({1, 2, 32, 100}, "shared_memory: written 3 bytes past its end (cluster 0, block 1)",
              [] {
                if (block_rank() == 1 && first_thread()) shared_memory()[103] = 0;
              }));
#endif
}

}  // namespace

int main() {
  test_places();
  test_schedules();
  test_temperaments();
  test_schedules_show_races();
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    set_schedule(seed);
    test_shared_memory_starts_poisoned();
    test_syncs_and_exchanges();
    test_blocks_meet_in_memory();
    test_shuffle_reaches_every_lane();
    test_pipeline();
    test_load_is_late();
    test_store_is_late();
    test_waiting_for_a_later_issue();
    test_parity_of_a_fresh_barrier();
  }
  set_schedule(0);
  test_missed_phase();
  test_sync_misuse();
  test_shuffle_misuse();
  test_load_remote_misuse();
  test_barrier_misuse();
  test_copy_checks();
  test_load_misuse();
  test_store_misuse();
  test_store_needs_the_fence_of_every_thread();
  test_launch_checks();
  test_failure_unwinds_the_threads();
  test_overrun_is_found();
  return kdk::test::checks_failed();
}
