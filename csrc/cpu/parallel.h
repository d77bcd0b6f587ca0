// Threads. PyTorch runs on the same OpenMP library, so its warm threads are the ones used here.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace noisyq::cpu {

// Fewer elements than this are not worth waking a thread.
constexpr int64_t kElementsPerThread = 32768;

inline int useful_threads(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));
}

// One member of a team of threads, with an equal share of a range.
struct Member {
  int index;
  int team;

  int64_t begin(int64_t n) const { return n * index / team; }
  int64_t end(int64_t n) const { return n * (index + 1) / team; }

  void wait_for_team() const {
    if (team == 1) return;
#ifdef _OPENMP
#pragma omp barrier
#endif
  }
};

// Runs `body(member)` once on each thread.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(Member{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Member{0, 1});
}

}  // namespace noisyq::cpu
