// The little of onnxruntime's C API that operators need: what they are given, what they return, and its threads.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

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

 private:
  const OrtKernelInfo* info_;
};

// What an operator is called with.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : context_(context) {}

  Tensor input(size_t index) const;
  template <typename T>
  T* output(size_t index, const std::vector<int64_t>& shape) {
    return static_cast<T*>(output_data(index, shape));
  }

  // Run work(worker) for each worker in [0, workers), on onnxruntime's threads. work must not throw.
  template <typename Work>
  void parallel(int workers, Work work) {
    if (workers == 1) return static_cast<void>(work(0));
    const auto run = [](void* data, size_t worker) { (*static_cast<Work*>(data))(static_cast<int>(worker)); };
    check(api->KernelContext_ParallelFor(context_, run, workers, 0, &work));
  }

  // Run work(task, worker) for each task, whoever of at most `threads` workers is free.
  template <typename Work>
  void share(int tasks, int threads, Work work);

 private:
  void* output_data(size_t index, const std::vector<int64_t>& shape);

  OrtKernelContext* context_;
};

// Memory for intermediate results, in two parts. A thread keeps it: the next call finds its pages there.
float* scratch(int part, size_t floats);

}  // namespace edgelm

#include <atomic>

template <typename Work>
void edgelm::Call::share(int tasks, int threads, Work work) {
  std::atomic<int> next{0};
  parallel(tasks < threads ? tasks : threads, [&](int worker) {
    for (int task = next++; task < tasks; task = next++) work(task, worker);
  });
}
