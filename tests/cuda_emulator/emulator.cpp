// Runs CUDA kernels on the host. A thread of a block is a fiber, with a stack of its own, that runs
// until it waits for others: for its warp (shuffles), its block (barriers) or the grid. Fibers are
// resumed in an order that is drawn anew each time, so that a barrier that is missing shows. Blocks
// run on several threads of the host, in a drawn order too; those of a cooperative launch all at
// once. What a GPU would refuse or never finish is an error: launches beyond its limits, and
// threads that wait for each other in different places, or that use more shared memory than was
// asked for.
//
// Not emulated: threads of a block that race between two barriers, the weak order of memory among
// blocks, and what differs in hardware (its division is IEEE like the host's).
#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "bindings.h"

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace noisyq::cuda {
// As much as a block of an H100 may ask for.
extern thread_local unsigned char shared[];
alignas(16) thread_local unsigned char shared[227 * 1024];
}  // namespace noisyq::cuda

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr size_t kShared = sizeof(noisyq::cuda::shared);
constexpr unsigned char kUnused = 0xA5;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kHostThreads = 3;
constexpr unsigned kMultiprocessors = 4;

std::map<const void*, size_t> shared_granted;

// The blocks of a cooperative launch, each on its own thread of the host.
class GridBarrier {
 public:
  explicit GridBarrier(unsigned blocks) : blocks_(blocks) {}

  void wait() {
    std::unique_lock lock(mutex_);
    const unsigned generation = generation_;
    if (++arrived_ == blocks_) {
      arrived_ = 0;
      ++generation_;
      change_.notify_all();
      return;
    }
    change_.wait(lock, [&] { return generation != generation_ || left_; });
    if (generation == generation_) {
      throw std::runtime_error("emulator: blocks wait for one that has returned");
    }
  }

  // By a block that has returned or failed.
  void leave() {
    const std::lock_guard lock(mutex_);
    left_ = true;
    change_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable change_;
  const unsigned blocks_;
  unsigned arrived_ = 0, generation_ = 0;
  bool left_ = false;
};

enum class Wait { none, warp, block, grid, done };

struct Fiber {
  jmp_buf at;
  bool started = false;
  Wait wait = Wait::none;
  uint32_t shuffled = 0;
};

class Block {
 public:
  Block(const std::function<void()>& run_thread, GridBarrier* grid)
      : run_thread_(run_thread), grid_(grid), fibers_(blockDim.x) {
    if (stacks.size() < blockDim.x) stacks.resize(blockDim.x);
    for (auto& stack : stacks) {
      if (!stack) stack.reset(new unsigned char[kStackBytes]);
    }
  }

  void run(std::mt19937& random) {
    running = this;
    std::vector<unsigned> order(fibers_.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    while (!all_wait_for(Wait::done, 0, size())) {
      std::shuffle(order.begin(), order.end(), random);
      for (const unsigned i : order) {
        if (fibers_[i].wait == Wait::none) resume(i);
      }
      release();
    }
  }

  void wait(Wait what) {
    Fiber& fiber = fibers_[current_];
    fiber.wait = what;
    if (_setjmp(fiber.at) == 0) _longjmp(scheduler_, 1);
  }

  uint32_t shuffle(uint32_t value, int offset) {
    const unsigned lane = current_;
    fibers_[lane].shuffled = value;
    wait(Wait::warp);
    const uint32_t other = fibers_[lane ^ offset].shuffled;
    wait(Wait::warp);  // before anyone shuffles the next value
    return other;
  }

  static thread_local Block* running;

 private:
  unsigned size() const { return static_cast<unsigned>(fibers_.size()); }

  void resume(unsigned i) {
    current_ = i;
    threadIdx.x = i;
    Fiber& fiber = fibers_[i];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }

  static void enter() {
    running->run_thread_();
    running->wait(Wait::done);
  }

  bool all_wait_for(Wait what, unsigned begin, unsigned end) const {
    return std::all_of(fibers_.begin() + begin, fibers_.begin() + end,
                       [&](const Fiber& fiber) { return fiber.wait == what; });
  }

  // Threads that have returned are not waited for at a barrier; a warp shuffles with all lanes.
  void release() {
    bool released = false;
    for (unsigned begin = 0; begin < size(); begin += kWarp) {
      const unsigned end = begin + kWarp;
      if (all_wait_for(Wait::warp, begin, end)) {
        for (unsigned i = begin; i < end; ++i) fibers_[i].wait = Wait::none;
        released = true;
      }
    }
    for (const Wait what : {Wait::block, Wait::grid}) {
      const bool everyone = std::all_of(fibers_.begin(), fibers_.end(), [&](const Fiber& fiber) {
        return fiber.wait == what || fiber.wait == Wait::done;
      });
      if (!everyone || all_wait_for(Wait::done, 0, size())) continue;
      if (what == Wait::grid) grid_->wait();
      for (Fiber& fiber : fibers_) {
        if (fiber.wait == what) fiber.wait = Wait::none;
      }
      released = true;
    }
    if (!released && !all_wait_for(Wait::done, 0, size())) {
      throw std::runtime_error("emulator: threads wait for each other in different places");
    }
  }

  const std::function<void()>& run_thread_;
  GridBarrier* grid_;
  std::vector<Fiber> fibers_;
  jmp_buf scheduler_;
  unsigned current_ = 0;
  static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
};

thread_local Block* Block::running = nullptr;
thread_local std::vector<std::unique_ptr<unsigned char[]>> Block::stacks;

bool is_cooperative(const cudaLaunchConfig_t& config) {
  return config.numAttrs > 0 && config.attrs[0].val.cooperative != 0;
}

cudaError_t refused(const cudaLaunchConfig_t& config, const void* kernel) {
  const unsigned threads = config.blockDim.x;
  const auto granted = shared_granted.find(kernel);
  const size_t shared = granted == shared_granted.end() ? kSharedWithoutAsking : granted->second;
  if (config.gridDim.x == 0 || threads == 0 || threads > kMaxThreads || threads % kWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > std::max(shared, kSharedWithoutAsking)) {
    return cudaErrorInvalidValue;
  }
  if (is_cooperative(config) && config.gridDim.x > kMultiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& run_thread) {
  if (const cudaError_t error = refused(config, kernel)) return error;
  const unsigned blocks = config.gridDim.x;
  const bool cooperative = is_cooperative(config);
  GridBarrier grid(blocks);
  std::mt19937 random(blocks);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);

  std::atomic<unsigned> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&](unsigned seed) {
    std::mt19937 order_of_threads(seed);
    for (unsigned i = next++; i < blocks; i = next++) {
      gridDim = config.gridDim;
      blockDim = config.blockDim;
      blockIdx = dim3(order[i]);
      // On a GPU it holds anything.
      std::fill(std::begin(noisyq::cuda::shared), std::end(noisyq::cuda::shared), kUnused);
      try {
        Block(run_thread, &grid).run(order_of_threads);
        const auto* unasked = noisyq::cuda::shared + config.dynamicSmemBytes;
        if (std::any_of(unasked, std::cend(noisyq::cuda::shared),
                        [](auto byte) { return byte != kUnused; })) {
          throw std::runtime_error("emulator: more shared memory was used than was asked for");
        }
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
      }
      grid.leave();
    }
  };
  std::vector<std::thread> threads;
  const unsigned count = cooperative ? blocks : std::min(blocks, kHostThreads);
  for (unsigned i = 0; i < count; ++i) threads.emplace_back(work, blocks + i);
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  return cudaSuccess;
}

void wait_for_grid() { Block::running->wait(Wait::grid); }

}  // namespace emulator

void __syncthreads() { emulator::Block::running->wait(emulator::Wait::block); }

uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int offset) {
  return emulator::Block::running->shuffle(value, offset);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrCooperativeLaunch ? 1 : static_cast<int>(emulator::kShared);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulator::kShared) return cudaErrorInvalidValue;
  emulator::shared_granted[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

PYBIND11_MODULE(emulated, m) { noisyq::bind_cuda(m); }
