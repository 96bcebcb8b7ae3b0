// The little of onnxruntime's C API that operators need: what they are given, what they return, and its threads.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"
#include "team.h"

namespace edgelm {

// onnxruntime keeps older versions of its interface: this one is in all releases since 1.21.
constexpr uint32_t kApiVersion = 21;

extern const OrtApi* api;

// Throws std::runtime_error with onnxruntime's message.
void check(OrtStatus* status);

struct Tensor {
  const void* data = nullptr;  // null: an optional input that is not there
  std::vector<int64_t> shape;

  template <typename T>
  const T* values() const {
    return static_cast<const T*>(data);
  }
};

// What an operator is created with.
class Info {
 public:
  explicit Info(const OrtKernelInfo* info) : info_(info) {}

  int64_t integer(const char* name, int64_t otherwise) const;
  float number(const char* name, float otherwise) const;
  std::string text(const char* name, const char* otherwise) const;
  // A constant input, which lives as long as the session. Throws if the input is computed.
  Tensor constant(size_t index) const;
  // The shape that the graph gives an input; -1 for sizes that it does not fix.
  std::vector<int64_t> shape(size_t index) const;

 private:
  const OrtKernelInfo* info_;
};

// What an operator is called with.
class Call {
 public:
  // own_threads: whether the operators compute on threads of their own, or on onnxruntime's.
  Call(OrtKernelContext* context, bool own_threads) : context_(context), own_threads_(own_threads) {}

  Tensor input(size_t index) const;
  // The values alone, null for an optional input that is not there: a shape costs more than they do.
  template <typename T>
  const T* values(size_t index) const {
    return static_cast<const T*>(data(index));
  }
  template <typename T>
  T* output(size_t index, const std::vector<int64_t>& shape) {
    return static_cast<T*>(output_data(index, shape));
  }

  // Run work(worker) for each worker in [0, workers), on the operators' own threads as `together` does, or on
  // onnxruntime's. work may only wait for what a running worker has begun, and must not throw.
  template <typename Work>
  void parallel(int workers, Work work, const Reads& reads = {},
                const std::shared_ptr<Successor>& successor = nullptr) {
    if (workers == 1) return static_cast<void>(work(0));
    const auto run = [](void* data, int worker) { (*static_cast<Work*>(data))(worker); };
    if (own_threads_) return together(workers, run, &work, reads, successor);
    const auto run_one = [](void* data, size_t worker) { (*static_cast<Work*>(data))(static_cast<int>(worker)); };
    check(api->KernelContext_ParallelFor(context_, run_one, workers, 0, &work));
  }

  // Run work(task, worker) for each task, whoever of at most `threads` workers is free.
  template <typename Work>
  void share(int tasks, int threads, Work work);

 private:
  const void* data(size_t index) const;
  void* output_data(size_t index, const std::vector<int64_t>& shape);

  OrtKernelContext* context_;
  bool own_threads_;
};

// Memory for intermediate results, in two parts. A thread keeps it: the next call finds its pages there.
float* scratch(int part, size_t floats);

// Hands out arrays, each from a cache line on, of memory that begins at one; from 0 on it counts what is needed.
class Memory {
 public:
  explicit Memory(float* begin) : next_((reinterpret_cast<uintptr_t>(begin) + kLine - 1) / kLine * kLine) {}

  template <typename T>
  T* take(size_t count) {
    T* const array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kLine - 1) / kLine * kLine;
    return array;
  }
  // `layout(memory)` with memory of a part of `scratch` that is as large as it takes.
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
