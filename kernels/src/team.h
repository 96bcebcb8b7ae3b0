// A thread team, which computes an operator in place of onnxruntime's threads. Between two operators, onnxruntime's
// threads would rest; a thread team prefetches.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <thread>

namespace edgelm {

constexpr int kMostWorkers = 64;

// Where the indices of a call begin to read: index i at begin + i * stride.
struct Reads {
  const void* begin = nullptr;
  size_t stride = 0;
};

// What the next operator reads, learned from one step to the next. Addresses are only prefetched, never read, so they
// may be out of date.
class Successor {
 public:
  void learn(const Reads& reads) {
    begin_.store(static_cast<const char*>(reads.begin), std::memory_order_relaxed);
    stride_.store(reads.stride, std::memory_order_relaxed);
  }
  // Where an index will begin; null: not known.
  const char* begin(int index) const {
    const char* const first = begin_.load(std::memory_order_relaxed);
    return first == nullptr ? nullptr : first + index * stride_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<const char*> begin_{nullptr};
  std::atomic<size_t> stride_{0};
};

// Run work(data, i) once for each i in [0, count), count at most kMostWorkers, on the calling thread and on threads
// that wait for such calls; returns when all are done. Index i is meant for the i-th thread. If that thread does not
// come in time, another one takes the index over. So work may only wait for what a running index has begun. work must
// not throw.
//
// reads: what the calling operator reads first. successor: the calling operator's. Threads that are done prefetch the
// memory that the next operator will read. Otherwise the memory would be idle while a row is normed or onnxruntime
// works.
//
// Threads are started when they are first needed; throws std::runtime_error if no more can be started. They spin for a
// millisecond while they wait for the next call, which is longer than a session takes between two operators or steps;
// then they sleep. If several threads call at once, each call has a thread team of its own. A forked process has none
// of these threads, so there the calling thread computes alone.
void together(int count, void (*work)(void* data, int index), void* data, const Reads& reads,
              const std::shared_ptr<Successor>& successor);

// Tasks [0, count) for some workers. Each worker has a run of consecutive tasks; a worker that is done with its own run
// takes tasks that others have left.
class Runs {
 public:
  Runs(int count, int workers);

  // The last task of a worker's own run.
  int last(int worker) const { return runs_[worker].end - 1; }
  // The next task of a worker; -1: there is none.
  int take(int worker);

 private:
  struct alignas(64) Run {
    std::atomic<int> next;
    int end;
  };

  int workers_;
  Run runs_[kMostWorkers];
};

// Tells the processor that a thread waits for another one.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

// Waits for what another thread has begun. Lets other threads run from time to time, in case not all of them have a
// processor.
template <typename Done>
inline void wait_until(Done done) {
  constexpr int kLooks = 1024;
  for (int look = 1; !done(); look++) look % kLooks == 0 ? std::this_thread::yield() : relax();
}

}  // namespace edgelm
