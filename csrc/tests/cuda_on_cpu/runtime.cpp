// The scheduler of a cluster's threads, and the checks of every primitive. A fiber (fibers.h) runs
// one thread of one cluster after the other and is kept for the launches to come.
//
// After the first failure every thread that has started is resumed once more, throws Abandoned
// where it waited and so leaves the kernel by unwinding its stack. Nothing is left behind on it.

#undef _FORTIFY_SOURCE  // see fibers.h

#include "tests/cuda_on_cpu/runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/cuda_on_cpu/fibers.h"

namespace kdk::gpu {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxClusterBlocks = 16;
constexpr std::size_t kAlignment = 128;
constexpr std::size_t kCopyUnit = 16;
// All ones is NaN in float32, float16 and bfloat16.
constexpr int kPoison = 0xFF;
constexpr int kCanary = 0xA5;
// Under AddressSanitizer the heap block of the shared memory has to end where the shared memory
// ends, and needs no canary.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kCanaryBytes = 0;
#else
constexpr std::size_t kCanaryBytes = 256;
#endif

// ---- What a cluster consists of ---------------------------------------------------------------

enum class Where {
  kUnstarted,
  kRunnable,
  kSyncBlock,
  kSyncCluster,
  kShuffle,
  kMemoryAwait,
  kBarrierWait,
  kReturned,
};

constexpr std::pair<Where, const char*> kWaiting[] = {
    {Where::kSyncBlock, "at sync_block"},     {Where::kSyncCluster, "at sync_cluster"},
    {Where::kShuffle, "at shuffle_xor"},      {Where::kMemoryAwait, "at memory_await"},
    {Where::kBarrierWait, "at barrier_wait"}, {Where::kReturned, "returned"},
};

struct Range {
  const char* begin;
  std::size_t bytes;

  bool overlaps(const Range& other) const {
    return begin < other.begin + other.bytes && other.begin < begin + bytes;
  }
};

struct Thread {
  Thread(Context& creator, void (*body)()) : fiber(creator, body) {}

  Fiber fiber;
  runtime::Place place = {};
  int index = 0;
  Where where = Where::kReturned;
  const float* offered = nullptr;
  float* received = nullptr;
  std::uint64_t fenced_interval = 0;
};

struct Warp {
  int arrived = 0;
  int mask = 0;
  int count = 0;
};

struct Load {
  char* shared;
  const void* global;
  std::size_t bytes;
  std::size_t barrier;

  Range destination() const { return {shared, bytes}; }
};

struct Store {
  char* global;
  Range source;
  const Thread* issuer;
};

struct TransactionBarrier {
  const void* address = nullptr;
  std::uint64_t phase = 0;
  bool arrived = false;
  std::uint64_t expected = 0;
  std::uint64_t queued = 0;
  std::vector<Thread*> waiting;

  bool completed(int parity) const { return phase % 2 != static_cast<unsigned>(parity); }
  bool can_complete() const { return arrived && queued == expected; }
};

struct Block {
  std::vector<Warp> warps;
  std::vector<TransactionBarrier> barriers;
  std::vector<Load> loads;
  std::vector<Store> stores;
  int at_sync_block = 0;
  int at_sync_cluster = 0;
  int returned = 0;
  // An interval lies between two barriers of the whole block.
  std::uint64_t interval = 1;
  int fenced = 0;
  bool fenced_last_interval = false;
};

// What a live barrier's memory holds: a mark, and where its state is.
constexpr std::uint64_t kBarrierMark = 0x6b646b00u;

std::uint64_t barrier_token(std::size_t index) { return kBarrierMark << 32 | index; }

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using SharedMemory = std::unique_ptr<char, Free>;

SharedMemory allocate_shared(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes + kCanaryBytes) != 0) throw std::bad_alloc();
  return SharedMemory(static_cast<char*>(memory));
}

bool is_aligned(const void* pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

// ---- The order in which threads run -----------------------------------------------------------

class Schedule {
 public:
  void start(std::uint64_t seed) {
    seed_ = state_ = seed;
    ready_.clear();
  }

  bool empty() const { return ready_.empty(); }

  Thread* next() {
    Thread* thread = ready_.front();
    ready_.pop_front();
    return thread;
  }

  // A group that goes to the front runs ahead of the others.
  void add(std::vector<Thread*>& group) {
    if (seed_ == 0) {
      ready_.insert(ready_.end(), group.begin(), group.end());
      return;
    }
    for (std::size_t i = group.size(); i > 1; --i) std::swap(group[i - 1], group[random(i)]);
    const bool runs_ahead = random(3) < seed_ % 4;
    ready_.insert(runs_ahead ? ready_.begin() : ready_.end(), group.begin(), group.end());
  }

  // Whether a thread that could go on lets others run, and then queues it.
  bool preempt(Thread* thread) {
    if (seed_ == 0 || random(2) == 0) return false;
    ready_.push_back(thread);
    return true;
  }

 private:
  // SplitMix64.
  std::uint64_t random(std::uint64_t limit) {
    std::uint64_t bits = state_ += 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return (bits ^ (bits >> 31)) % limit;
  }

  std::uint64_t seed_ = 0;
  std::uint64_t state_ = 0;
  std::deque<Thread*> ready_;
};

// ---- The machine ------------------------------------------------------------------------------

// Unwinds a thread of a launch that has failed.
struct Abandoned {};

class Machine {
 public:
  void set_seed(std::uint64_t seed) { seed_ = seed; }
  void launch(const Launch& shape, const std::function<void()>& kernel);
  const runtime::Place& place() { return running().place; }

  void sync_block();
  void sync_cluster();
  void shuffle_xor(const float* values, int mask, float* received, int count);
  float load_remote(const float* shared, int rank);
  void memory_arrive(std::uint32_t* arrivals);
  void memory_await(const std::uint32_t* arrivals, std::uint32_t count);
  void barrier_init(void* address);
  void barrier_expect(const void* address, std::uint32_t bytes);
  void barrier_wait(const void* address, int parity);
  void bulk_load(void* shared, const void* global, std::uint32_t bytes, const void* barrier);
  void bulk_store(void* global, const void* shared, std::uint32_t bytes);
  void bulk_wait_read();
  void fence_async();

  void run_thread();

 private:
  void run_cluster(int cluster);
  void start_block(int rank);
  void check_canary(int rank);
  void finish_thread();
  void leave_thread();
  void abandon_threads();

  [[noreturn]] void fail(const std::string& primitive, const std::string& what);
  void record(const std::string& message);
  std::string describe_deadlock() const;

  void wait(Where where);
  void dispatch();
  void release(int first, int count);
  void release(std::vector<Thread*>& group);

  Thread& running() {
    if (running_ == nullptr) throw std::runtime_error("a primitive is called outside of a launch");
    return *running_;
  }
  Block& block() { return blocks_[running().place.block]; }
  int first_thread(int block) const { return block * shape_.threads; }
  bool inside_shared(const void* pointer, std::size_t bytes);
  void end_interval(Block& block);
  void check_copy(const char* primitive, const void* shared, const void* global, std::size_t bytes);
  TransactionBarrier& live_barrier(const char* primitive, const void* address);
  void phase_changed(const char* primitive, TransactionBarrier& barrier);
  void complete_phase(TransactionBarrier& barrier);

  std::uint64_t seed_ = 0;
  Context main_;
  std::vector<std::unique_ptr<Thread>> threads_;

  Launch shape_ = {};
  const std::function<void()>* kernel_ = nullptr;
  std::vector<SharedMemory> shared_;
  std::vector<Block> blocks_;
  Schedule schedule_;
  Thread* running_ = nullptr;
  int at_sync_cluster_ = 0;
  int returned_ = 0;
  std::vector<Thread*> awaiting_memory_;
  std::exception_ptr failure_;
};

Machine& machine() {
  thread_local Machine instance;
  return instance;
}

// ---- Failures ---------------------------------------------------------------------------------

// The first failure is the one that the launch reports.
void Machine::record(const std::string& message) {
  if (!failure_) failure_ = std::make_exception_ptr(std::runtime_error(message));
}

void Machine::fail(const std::string& primitive, const std::string& what) {
  const runtime::Place& place = running().place;
  record(primitive + ": " + what + " (cluster " + std::to_string(place.cluster) + ", block " +
         std::to_string(place.block) + ", thread " + std::to_string(place.thread) + ")");
  throw Abandoned();
}

std::string Machine::describe_deadlock() const {
  std::string text = "deadlock: ";
  for (int rank = 0; rank < shape_.cluster_blocks; ++rank) {
    text += (rank == 0 ? "block " : "; block ") + std::to_string(rank) + ":";
    const char* separator = " ";
    for (const auto& [where, name] : kWaiting) {
      int count = 0;
      for (int i = 0; i < shape_.threads; ++i) {
        count += threads_[first_thread(rank) + i]->where == where;
      }
      if (count == 0) continue;
      text += separator + std::to_string(count) + " " + name;
      separator = ", ";
    }
  }
  return text + " (cluster " + std::to_string(threads_[0]->place.cluster) + ")";
}

// ---- Launch and scheduling --------------------------------------------------------------------

void thread_body() {
  for (;;) machine().run_thread();
}

void check_shape(const Launch& shape) {
  if (shape.clusters < 1) throw std::runtime_error("launch: no clusters");
  if (shape.cluster_blocks < 1 || shape.cluster_blocks > kMaxClusterBlocks) {
    throw std::runtime_error("launch: a cluster has 1 to 16 blocks");
  }
  if (shape.threads < kWarp || shape.threads > kMaxThreads || shape.threads % kWarp != 0) {
    throw std::runtime_error("launch: a block has 32 to 1024 threads, a multiple of 32");
  }
}

void Machine::launch(const Launch& shape, const std::function<void()>& kernel) {
  check_shape(shape);
  if (running_ != nullptr) throw std::runtime_error("launch: called by a kernel");
  shape_ = shape;
  kernel_ = &kernel;
  const int threads = shape.cluster_blocks * shape.threads;
  while (static_cast<int>(threads_.size()) < threads) {
    threads_.push_back(std::make_unique<Thread>(main_, thread_body));
  }
  shared_.clear();
  for (int rank = 0; rank < shape.cluster_blocks; ++rank) {
    shared_.push_back(allocate_shared(shape.shared_bytes));
  }
  schedule_.start(seed_);
  failure_ = nullptr;
  for (int cluster = 0; cluster < shape.clusters && !failure_; ++cluster) run_cluster(cluster);
  shared_.clear();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Machine::run_cluster(int cluster) {
  at_sync_cluster_ = 0;
  returned_ = 0;
  awaiting_memory_.clear();
  blocks_.assign(shape_.cluster_blocks, Block());
  std::vector<Thread*> group;
  for (int rank = 0; rank < shape_.cluster_blocks; ++rank) {
    start_block(rank);
    for (int i = 0; i < shape_.threads; ++i) {
      Thread& thread = *threads_[first_thread(rank) + i];
      thread.place = {i,
                      shape_.threads,
                      rank,
                      shape_.cluster_blocks,
                      cluster,
                      shape_.clusters,
                      shared_[rank].get()};
      thread.index = first_thread(rank) + i;
      thread.where = Where::kUnstarted;
      thread.fenced_interval = 0;
      group.push_back(&thread);
    }
  }
  schedule_.add(group);
  running_ = schedule_.next();
  switch_context(main_, running_->fiber.context);
  if (failure_) abandon_threads();
  running_ = nullptr;
  for (int rank = 0; rank < shape_.cluster_blocks; ++rank) check_canary(rank);
}

void Machine::start_block(int rank) {
  blocks_[rank].warps.resize(shape_.threads / kWarp);
  std::memset(shared_[rank].get(), kPoison, shape_.shared_bytes);
  std::memset(shared_[rank].get() + shape_.shared_bytes, kCanary, kCanaryBytes);
}

void Machine::check_canary(int rank) {
  const char* canary = shared_[rank].get() + shape_.shared_bytes;
  for (std::size_t i = 0; i < kCanaryBytes; ++i) {
    if (static_cast<unsigned char>(canary[i]) == kCanary) continue;
    record("shared_memory: written " + std::to_string(i) + " bytes past its end (cluster " +
           std::to_string(threads_[0]->place.cluster) + ", block " + std::to_string(rank) + ")");
    return;
  }
}

// One pass of a fiber: one thread of one cluster. The switch away comes after the handlers, because
// the C++ runtime counts the exceptions being handled per system thread.
void Machine::run_thread() {
  try {
    running_->where = Where::kRunnable;
    (*kernel_)();
    finish_thread();
  } catch (const Abandoned&) {
  } catch (...) {
    if (!failure_) failure_ = std::current_exception();
  }
  running_->where = Where::kReturned;
  leave_thread();
}

void Machine::finish_thread() {
  Block& block = this->block();
  for (const Store& store : block.stores) {
    if (store.issuer != running_) continue;
    fail("bulk_store", "the thread returned before bulk_wait_read");
  }
  if (block.at_sync_block > 0) {
    fail("sync_block", "the thread returned while " + std::to_string(block.at_sync_block) +
                           " threads of its block wait");
  }
  if (at_sync_cluster_ > 0) {
    fail("sync_cluster", "the thread returned while " + std::to_string(at_sync_cluster_) +
                             " threads of its cluster wait");
  }
  ++returned_;
  if (++block.returned == shape_.threads && !block.loads.empty()) {
    fail("bulk_load", "the block returned before " + std::to_string(block.loads.size()) +
                          " of its loads were waited for");
  }
}

void Machine::leave_thread() {
  Context& own = running_->fiber.context;
  const bool all_returned = returned_ == shape_.cluster_blocks * shape_.threads;
  if (!failure_ && !all_returned && schedule_.empty()) record(describe_deadlock());
  if (failure_ || all_returned) {
    switch_context(own, main_);
    return;
  }
  running_ = schedule_.next();
  switch_context(own, running_->fiber.context);
}

void Machine::abandon_threads() {
  const int threads = shape_.cluster_blocks * shape_.threads;
  for (int index = 0; index < threads; ++index) {
    Thread& thread = *threads_[index];
    if (thread.where == Where::kUnstarted || thread.where == Where::kReturned) continue;
    running_ = &thread;
    switch_context(main_, thread.fiber.context);
  }
  schedule_.start(seed_);
}

// Goes on with the next runnable thread. Returns when the calling one has its turn again.
void Machine::dispatch() {
  if (schedule_.empty()) {
    record(describe_deadlock());
    throw Abandoned();
  }
  Thread& self = *running_;
  running_ = schedule_.next();
  if (running_ != &self) switch_context(self.fiber.context, running_->fiber.context);
  if (failure_) throw Abandoned();
}

void Machine::wait(Where where) {
  running_->where = where;
  dispatch();
}

void Machine::release(std::vector<Thread*>& group) {
  for (Thread* thread : group) thread->where = Where::kRunnable;
  schedule_.add(group);
}

void Machine::release(int first, int count) {
  std::vector<Thread*> group;
  group.reserve(count);
  for (int i = 0; i < count; ++i) group.push_back(threads_[first + i].get());
  release(group);
}

// ---- Barriers of blocks and clusters, exchanges -----------------------------------------------

void Machine::end_interval(Block& block) {
  block.fenced_last_interval = block.fenced == shape_.threads;
  block.fenced = 0;
  ++block.interval;
}

void Machine::sync_block() {
  Block& block = this->block();
  if (block.returned > 0) {
    fail("sync_block", std::to_string(block.returned) + " threads of the block have returned");
  }
  if (block.at_sync_cluster > 0) {
    fail("sync_block",
         std::to_string(block.at_sync_cluster) + " threads of the block are at sync_cluster");
  }
  if (++block.at_sync_block < shape_.threads) return wait(Where::kSyncBlock);
  block.at_sync_block = 0;
  end_interval(block);
  release(first_thread(running_->place.block), shape_.threads);
  dispatch();
}

void Machine::sync_cluster() {
  Block& block = this->block();
  if (returned_ > 0) {
    fail("sync_cluster", std::to_string(returned_) + " threads of the cluster have returned");
  }
  if (block.at_sync_block > 0) {
    fail("sync_cluster",
         std::to_string(block.at_sync_block) + " threads of the block are at sync_block");
  }
  const int threads = shape_.cluster_blocks * shape_.threads;
  ++block.at_sync_cluster;
  if (++at_sync_cluster_ < threads) return wait(Where::kSyncCluster);
  at_sync_cluster_ = 0;
  for (Block& each : blocks_) {
    each.at_sync_cluster = 0;
    end_interval(each);
  }
  release(0, threads);
  dispatch();
}

void Machine::shuffle_xor(const float* values, int mask, float* received, int count) {
  Warp& warp = block().warps[running().place.thread / kWarp];
  if (mask < 0 || mask >= kWarp) {
    fail("shuffle_xor", "mask " + std::to_string(mask) + " is not in 0..31");
  }
  if (warp.arrived > 0 && (warp.mask != mask || warp.count != count)) {
    const auto described = [](int lane_mask, int lane_count) {
      return "mask " + std::to_string(lane_mask) + " and " + std::to_string(lane_count) + " values";
    };
    fail("shuffle_xor",
         described(mask, count) + " where other lanes have " + described(warp.mask, warp.count));
  }
  Thread& self = *running_;
  self.offered = values;
  self.received = received;
  warp.mask = mask;
  warp.count = count;
  if (++warp.arrived < kWarp) return wait(Where::kShuffle);
  warp.arrived = 0;
  const int first = self.index / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    std::copy_n(threads_[first + (lane ^ mask)]->offered, count, threads_[first + lane]->received);
  }
  release(first, kWarp);
  dispatch();
}

bool Machine::inside_shared(const void* pointer, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(running().place.shared);
  const auto offset = reinterpret_cast<std::uintptr_t>(pointer) - begin;
  return offset <= shape_.shared_bytes && bytes <= shape_.shared_bytes - offset;
}

float Machine::load_remote(const float* shared, int rank) {
  if (!inside_shared(shared, sizeof(float)) || !is_aligned(shared, alignof(float))) {
    fail("load_remote", "the address is not that of a float in the block's shared memory");
  }
  if (rank < 0 || rank >= shape_.cluster_blocks) {
    fail("load_remote", "the cluster has no block " + std::to_string(rank));
  }
  if (blocks_[rank].returned == shape_.threads) {
    fail("load_remote", "block " + std::to_string(rank) + " has returned, its memory is gone");
  }
  const auto offset = reinterpret_cast<const char*>(shared) - running_->place.shared;
  float value;
  std::memcpy(&value, shared_[rank].get() + offset, sizeof value);
  return value;
}

void Machine::memory_arrive(std::uint32_t* arrivals) {
  ++*arrivals;
  release(awaiting_memory_);
  awaiting_memory_.clear();
}

// Differences, because the count may wrap around.
void Machine::memory_await(const std::uint32_t* arrivals, std::uint32_t count) {
  if (schedule_.preempt(&running())) dispatch();
  while (static_cast<std::int32_t>(*arrivals - count) < 0) {
    awaiting_memory_.push_back(running_);
    wait(Where::kMemoryAwait);
  }
}

// ---- Transaction barriers ---------------------------------------------------------------------

TransactionBarrier& Machine::live_barrier(const char* primitive, const void* address) {
  if (!inside_shared(address, sizeof(std::uint64_t)) ||
      !is_aligned(address, sizeof(std::uint64_t))) {
    fail(primitive, "the barrier is not 8 aligned bytes of the block's shared memory");
  }
  std::vector<TransactionBarrier>& barriers = block().barriers;
  const auto found =
      std::find_if(barriers.begin(), barriers.end(),
                   [=](const TransactionBarrier& each) { return each.address == address; });
  if (found == barriers.end()) fail(primitive, "the barrier is not initialised");
  std::uint64_t token;
  std::memcpy(&token, address, sizeof token);
  if (token != barrier_token(found - barriers.begin())) {
    fail(primitive, "the barrier has been overwritten");
  }
  return *found;
}

void Machine::barrier_init(void* address) {
  if (!inside_shared(address, sizeof(std::uint64_t)) ||
      !is_aligned(address, sizeof(std::uint64_t))) {
    fail("barrier_init", "the barrier is not 8 aligned bytes of the block's shared memory");
  }
  std::vector<TransactionBarrier>& barriers = block().barriers;
  for (const TransactionBarrier& each : barriers) {
    if (each.address == address) fail("barrier_init", "the barrier is already initialised");
  }
  const std::uint64_t token = barrier_token(barriers.size());
  std::memcpy(address, &token, sizeof token);
  barriers.emplace_back();
  barriers.back().address = address;
}

// Waiting threads are only made runnable: the copies are left to the first that runs.
void Machine::phase_changed(const char* primitive, TransactionBarrier& barrier) {
  if (barrier.arrived && barrier.queued > barrier.expected) {
    fail(primitive, "the barrier's phase gets " + std::to_string(barrier.queued) +
                        " bytes and expects " + std::to_string(barrier.expected));
  }
  if (!barrier.can_complete()) return;
  release(barrier.waiting);
  barrier.waiting.clear();
}

void Machine::barrier_expect(const void* address, std::uint32_t bytes) {
  TransactionBarrier& barrier = live_barrier("barrier_expect", address);
  if (barrier.arrived) fail("barrier_expect", "the barrier's phase has already had its arrival");
  barrier.arrived = true;
  barrier.expected = bytes;
  phase_changed("barrier_expect", barrier);
}

void Machine::complete_phase(TransactionBarrier& barrier) {
  Block& block = this->block();
  const auto own = static_cast<std::size_t>(&barrier - block.barriers.data());
  std::vector<Load> others;
  for (const Load& load : block.loads) {
    if (load.barrier == own) {
      std::memcpy(load.shared, load.global, load.bytes);
    } else {
      others.push_back(load);
    }
  }
  block.loads.swap(others);
  barrier.arrived = false;
  barrier.expected = barrier.queued = 0;
  ++barrier.phase;
}

void Machine::barrier_wait(const void* address, int parity) {
  if (parity != 0 && parity != 1) {
    fail("barrier_wait", "parity " + std::to_string(parity) + " is neither 0 nor 1");
  }
  if (schedule_.preempt(&running())) dispatch();
  for (;;) {
    TransactionBarrier& barrier = live_barrier("barrier_wait", address);
    if (barrier.completed(parity)) return;
    if (barrier.can_complete()) return complete_phase(barrier);
    barrier.waiting.push_back(running_);
    wait(Where::kBarrierWait);
  }
}

// ---- Bulk copies ------------------------------------------------------------------------------

void Machine::check_copy(const char* primitive, const void* shared, const void* global,
                         std::size_t bytes) {
  if (bytes == 0 || bytes % kCopyUnit != 0) {
    fail(primitive, "size " + std::to_string(bytes) + " is not a positive multiple of 16");
  }
  if (!is_aligned(shared, kCopyUnit)) fail(primitive, "the shared address is not 16-byte aligned");
  if (!is_aligned(global, kCopyUnit)) fail(primitive, "the global address is not 16-byte aligned");
  if (!inside_shared(shared, bytes)) {
    fail(primitive, "not all of the bytes lie in the block's shared memory");
  }
}

void Machine::bulk_load(void* shared, const void* global, std::uint32_t bytes,
                        const void* address) {
  check_copy("bulk_load", shared, global, bytes);
  TransactionBarrier& barrier = live_barrier("bulk_load", address);
  Block& block = this->block();
  const auto index = static_cast<std::size_t>(&barrier - block.barriers.data());
  const Load load = {static_cast<char*>(shared), global, bytes, index};
  for (const Load& other : block.loads) {
    if (!load.destination().overlaps(other.destination())) continue;
    fail("bulk_load", "the destination overlaps that of a pending bulk_load");
  }
  for (const Store& store : block.stores) {
    if (!load.destination().overlaps(store.source)) continue;
    fail("bulk_load", "the destination overlaps the source of a pending bulk_store");
  }
  std::memset(shared, kPoison, bytes);
  block.loads.push_back(load);
  barrier.queued += bytes;
  phase_changed("bulk_load", barrier);
}

void Machine::bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  check_copy("bulk_store", shared, global, bytes);
  Block& block = this->block();
  if (!block.fenced_last_interval) {
    fail("bulk_store", "bulk_store without fence_async before the barrier");
  }
  const Store store = {
      static_cast<char*>(global), {static_cast<const char*>(shared), bytes}, running_};
  for (const Load& load : block.loads) {
    if (!store.source.overlaps(load.destination())) continue;
    fail("bulk_store", "the source overlaps the destination of a pending bulk_load");
  }
  block.stores.push_back(store);
}

void Machine::bulk_wait_read() {
  Block& block = this->block();
  std::vector<Store> others;
  for (const Store& store : block.stores) {
    if (store.issuer == running_) {
      std::memcpy(store.global, store.source.begin, store.source.bytes);
    } else {
      others.push_back(store);
    }
  }
  block.stores.swap(others);
}

void Machine::fence_async() {
  Block& block = this->block();
  if (running_->fenced_interval == block.interval) return;
  running_->fenced_interval = block.interval;
  ++block.fenced;
}

}  // namespace

void launch(const Launch& shape, const std::function<void()>& kernel) {
  machine().launch(shape, kernel);
}

void set_schedule(std::uint64_t seed) { machine().set_seed(seed); }

namespace runtime {

const Place& place() { return machine().place(); }
void sync_block() { machine().sync_block(); }
void sync_cluster() { machine().sync_cluster(); }
void shuffle_xor(const float* values, int mask, float* received, int count) {
  machine().shuffle_xor(values, mask, received, count);
}
float load_remote(const float* shared, int rank) { return machine().load_remote(shared, rank); }
void memory_arrive(std::uint32_t* arrivals) { machine().memory_arrive(arrivals); }
void memory_await(const std::uint32_t* arrivals, std::uint32_t count) {
  machine().memory_await(arrivals, count);
}
void barrier_init(void* barrier) { machine().barrier_init(barrier); }
void barrier_expect(void* barrier, std::uint32_t bytes) {
  machine().barrier_expect(barrier, bytes);
}
void barrier_wait(void* barrier, int parity) { machine().barrier_wait(barrier, parity); }
void bulk_load(void* shared, const void* global, std::uint32_t bytes, void* barrier) {
  machine().bulk_load(shared, global, bytes, barrier);
}
void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  machine().bulk_store(global, shared, bytes);
}
void bulk_wait_read() { machine().bulk_wait_read(); }
void fence_async() { machine().fence_async(); }

}  // namespace runtime
}  // namespace kdk::gpu
