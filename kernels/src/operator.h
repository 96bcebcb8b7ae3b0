// The part of onnxruntime's C API that operators need: inputs, outputs, attributes and threads.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

// An annotation that onnxruntime's header uses on Windows, but only Microsoft's compiler has.
#if defined(_WIN32) && !defined(_Return_type_success_)
#define _Return_type_success_(success)
#endif

#include "onnxruntime_c_api.h"
#include "team.h"

namespace edgelm {

// onnxruntime keeps older versions of its interface: this one is in all releases since 1.21.
constexpr uint32_t kApiVersion = 21;

extern const OrtApi* api;

// Throws std::runtime_error with onnxruntime's message.
void check(OrtStatus* status);

// A graph is untrusted data: operators check everything that they rely on. Throws std::runtime_error.
inline void require(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(message);
}
// An attribute or a size as int; throws if it is not in [least, most].
int within(int64_t value, int64_t least, int64_t most, const char* what);

struct Tensor {
  const void* data = nullptr;  // null: an optional input that is not there
  std::vector<int64_t> shape;

  template <typename T>
  const T* values() const {
    return static_cast<const T*>(data);
  }
};

// The context in which an operator is created.
class Info {
 public:
  explicit Info(const OrtKernelInfo* info) : info_(info) {}

  int64_t integer(const char* name, int64_t otherwise) const;
  float number(const char* name, float otherwise) const;
  std::string text(const char* name, const char* otherwise) const;
  // A constant input, which lives as long as the session. Throws if the input is computed or not there.
  Tensor constant(size_t index) const;
  // The shape that the graph gives an input; -1 for sizes that it does not fix.
  std::vector<int64_t> shape(size_t index) const;

 private:
  const OrtKernelInfo* info_;
};

// The first exception of several threads, for the thread that waits for them.
class Failure {
 public:
  void keep() noexcept {
    const std::lock_guard guard(lock_);
    if (first_ == nullptr) first_ = std::current_exception();
  }
  void rethrow() const {
    if (first_ != nullptr) std::rethrow_exception(first_);
  }

 private:
  std::mutex lock_;
  std::exception_ptr first_;
};

// The context in which an operator is called.
class Call {
 public:
  // own_threads: whether the operators use their own threads, or onnxruntime's.
  Call(OrtKernelContext* context, bool own_threads) : context_(context), own_threads_(own_threads) {}

  // Throws if the input is missing, unless it is `optional`.
  Tensor input(size_t index, bool optional = false) const;
  bool has(size_t index) const;
  template <typename T>
  T* output(size_t index, const std::vector<int64_t>& shape) {
    return static_cast<T*>(output_data(index, shape));
  }

  // Run work(worker) for each worker in [0, workers), on the operators' own threads as `together` does, or on
  // onnxruntime's. work may only wait for something that a running worker has begun. The first exception of a worker is
  // thrown again here when all workers are done. A worker must not throw while another one waits for it.
  template <typename Work>
  void parallel(int workers, Work work, const Reads& reads = {},
                const std::shared_ptr<Successor>& successor = nullptr) {
    if (workers == 1) return static_cast<void>(work(0));
    Failure failure;
    auto guarded = [&](int worker) {
      try {
        work(worker);
      } catch (...) {
        failure.keep();
      }
    };
    using Guarded = decltype(guarded);
    const auto run = [](void* data, int worker) { (*static_cast<Guarded*>(data))(worker); };
    const auto run_one = [](void* data, size_t worker) { (*static_cast<Guarded*>(data))(static_cast<int>(worker)); };
    if (own_threads_)
      together(workers, run, &guarded, reads, successor);
    else
      check(api->KernelContext_ParallelFor(context_, run_one, workers, 0, &guarded));
    failure.rethrow();
  }

  // Run work(task, worker) for each task, on the next free one of at most `threads` workers.
  template <typename Work>
  void share(int tasks, int threads, Work work);

 private:
  void* output_data(size_t index, const std::vector<int64_t>& shape);

  OrtKernelContext* context_;
  bool own_threads_;
};

// Memory for intermediate results, in two parts. Each thread keeps it, so that the next call reuses its pages.
float* scratch(int part, size_t floats);

// Hands out arrays from a piece of memory, each aligned to a cache line. If the memory begins at null, it only counts
// what is needed.
class Memory {
 public:
  explicit Memory(float* begin) : next_((reinterpret_cast<uintptr_t>(begin) + kLine - 1) / kLine * kLine) {}

  template <typename T>
  T* take(size_t count) {
    T* const array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kLine - 1) / kLine * kLine;
    return array;
  }
  // Returns `layout(memory)`, where memory is a part of `scratch`, as large as the layout needs.
  template <typename Layout>
  static auto laid_out(int part, Layout layout) {
    Memory counted(nullptr);
    layout(counted);
    Memory memory(scratch(part, (counted.next_ + kLine) / sizeof(float)));
    return layout(memory);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  uintptr_t next_;
};

}  // namespace edgelm

#include <atomic>

template <typename Work>
void edgelm::Call::share(int tasks, int threads, Work work) {
  std::atomic<int> next{0};
  parallel(tasks < threads ? tasks : threads, [&](int worker) {
    for (int task = next++; task < tasks; task = next++) work(task, worker);
  });
}
