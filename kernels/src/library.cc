// What onnxruntime calls when the library is registered: adds the operators of the domain "edgelm" to a session.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "attention.h"
#include "operator.h"
#include "rowwise_matmul.h"
#include "system.h"

namespace edgelm {
namespace {

constexpr const char* kDomain = "edgelm";
// The session's number of threads. onnxruntime does not tell it to operators, so the runtime sets this option, too.
constexpr const char* kThreadsKey = "edgelm.threads";
// "1": operators compute on threads of their own, where hardly any other operator needs onnxruntime's.
constexpr const char* kOwnThreadsKey = "edgelm.own_threads";

using Types = std::vector<ONNXTensorElementDataType>;

// An operator in onnxruntime's form: a table of functions, followed by the data that they need.
struct Definition : OrtCustomOp {
  std::string name;
  Types inputs, outputs;
  size_t required;
  int threads;
  bool own_threads;
};

template <typename Operator>
struct Kernel {
  Operator operation;
  bool own_threads;
};

const Definition& of(const OrtCustomOp* op) { return *static_cast<const Definition*>(op); }

template <typename Function>
OrtStatus* guarded(Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ORT_FAIL, "there is not enough memory for what an operator computes in between");
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

template <typename Operator>
Definition* define(std::string name, Types inputs, Types outputs, size_t required, int threads, bool own_threads) {
  auto* op = new Definition{};
  op->name = std::move(name), op->inputs = std::move(inputs), op->outputs = std::move(outputs);
  op->required = required, op->threads = threads, op->own_threads = own_threads;
  op->version = kApiVersion;
  op->GetName = [](const OrtCustomOp* self) { return of(self).name.c_str(); };
  op->GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op->GetInputTypeCount = [](const OrtCustomOp* self) { return of(self).inputs.size(); };
  op->GetInputType = [](const OrtCustomOp* self, size_t index) { return of(self).inputs[index]; };
  op->GetInputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    return index < of(self).required ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op->GetOutputTypeCount = [](const OrtCustomOp* self) { return of(self).outputs.size(); };
  op->GetOutputType = [](const OrtCustomOp* self, size_t index) { return of(self).outputs[index]; };
  op->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op->GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op->GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op->GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op->GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op->GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op->CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return guarded(
        [&] { *kernel = new Kernel<Operator>{Operator(Info(info), of(self).threads), of(self).own_threads}; });
  };
  op->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] {
      const auto& self = *static_cast<const Kernel<Operator>*>(kernel);
      Call call(context, self.own_threads);
      self.operation.compute(call);
    });
  };
  op->KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Operator>*>(kernel); };
  return op;
}

// The number in a session's option; 0 if the option is not set.
int option(const OrtSessionOptions* options, const char* key) {
  char text[16] = {};
  size_t size = sizeof text;
  int there = 0;
  check(api->HasSessionConfigEntry(options, key, &there));
  if (there) check(api->GetSessionConfigEntry(options, key, text, &size));
  return std::atoi(text);
}

int threads_of(const OrtSessionOptions* options) {
  const int threads = option(options, kThreadsKey);
  if (threads < 1) throw std::runtime_error(std::string("set the session's option ") + kThreadsKey);
  return std::min(threads, kMostWorkers);
}

void add_operators(OrtSessionOptions* options) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  const int threads = threads_of(options);
  const bool own = option(options, kOwnThreadsKey) != 0;
  // The definitions live as long as the process: onnxruntime does not say when a session no longer needs them.
  OrtCustomOpDomain* domain = nullptr;
  check(api->CreateCustomOpDomain(kDomain, &domain));
  const Types product{kFloat, kInt8, kFloat}, normed{kFloat, kFloat, kFloat, kInt8, kFloat},
      post_normed{kFloat, kFloat, kFloat, kFloat, kInt8, kFloat};
  const auto add = [&](OrtCustomOp* op) { check(api->CustomOpDomain_Add(domain, op)); };
  // In four forms: rows of 8 and of 16 bits, without biases and with.
  const auto add_forms = [&]<typename Product, bool OfNibbles>(const std::string& name, Types inputs, Types outputs) {
    add(define<Formed<Product, 1, false, OfNibbles>>(name, inputs, outputs, inputs.size(), threads, own));
    add(define<Formed<Product, 2, false, OfNibbles>>(name + "16", inputs, outputs, inputs.size(), threads, own));
    inputs.push_back(kFloat);
    add(define<Formed<Product, 1, true, OfNibbles>>("Biased" + name, inputs, outputs, inputs.size(), threads, own));
    add(define<Formed<Product, 2, true, OfNibbles>>("Biased" + name + "16", inputs, outputs, inputs.size(), threads,
                                                    own));
  };
  // With weights of 8 bits, and of 4 to 6 bits. The latter are two inputs, in front of the scales, which are the last
  // input.
  const auto add_product = [&]<typename Product>(const std::string& name, Types inputs, Types outputs) {
    add_forms.operator()<Product, false>(name, inputs, outputs);
    inputs[inputs.size() - 2] = kUint8;
    inputs.insert(inputs.end() - 1, kUint8);
    for (const char* bits : {"Int4", "Int5", "Int6"}) add_forms.operator()<Product, true>(bits + name, inputs, outputs);
  };
  add_product.operator()<RowwiseMatMul>("RowwiseMatMul", product, {kFloat});
  add_forms.operator()<RowwiseMatMulTransposed, false>("RowwiseMatMulTransposed", product, {kFloat});
  add_product.operator()<NormedRowwiseMatMul>("NormedRowwiseMatMul", normed, {kFloat, kFloat});
  add_product.operator()<PostNormedRowwiseMatMul>("PostNormedRowwiseMatMul", post_normed, {kFloat, kFloat});
  add_product.operator()<GatedRowwiseMatMul>("GatedRowwiseMatMul", product, {kFloat});
  add_product.operator()<GeluGatedRowwiseMatMul>("GeluGatedRowwiseMatMul", product, {kFloat});
  for (const char* name : {"Int4Embedding", "Int5Embedding", "Int6Embedding"})
    add(define<NibbleEmbedding>(name, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, kUint8, kUint8, kFloat}, {kFloat}, 4,
                                threads, own));
  const auto add_attention = [&]<typename Cached>(ONNXTensorElementDataType cached) {
    Types inputs{kFloat, kFloat, kFloat, cached, cached, kInt32, kInt32,
                 kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat};
    const Types outputs{kFloat, cached, cached};
    for (const char* name : {"GroupQueryAttention", "NormedGroupQueryAttention"})
      add(define<Attention<Cached>>(name, inputs, outputs, 1, threads, own));
    inputs.push_back(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    for (const char* name : {"KeptGroupQueryAttention", "KeptNormedGroupQueryAttention"})
      add(define<Attention<Cached>>(name, inputs, outputs, 1, threads, own));
  };
  add_attention.operator()<int8_t>(kInt8);
  add_attention.operator()<float>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  check(api->AddCustomOpDomain(options, domain));
}

}  // namespace
}  // namespace edgelm

#if defined(_WIN32)
#define EDGELM_EXPORTED __declspec(dllexport)
#else
#define EDGELM_EXPORTED __attribute__((visibility("default")))
#endif

extern "C" {

// The instruction sets that the operators use on this processor, or null if they have no implementation for it.
EDGELM_EXPORTED const char* edgelm_kernels_arithmetic() {
  const edgelm::Arithmetic* found = edgelm::arithmetic();
  return found == nullptr ? nullptr : found->name;
}

EDGELM_EXPORTED OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  edgelm::api = base->GetApi(edgelm::kApiVersion);
  if (edgelm::api == nullptr) return nullptr;  // older than any onnxruntime that edgelm runs on
  if (edgelm::arithmetic() == nullptr)
    return edgelm::api->CreateStatus(ORT_FAIL, "edgelm-kernels has no implementation for this processor");
  return edgelm::guarded([&] {
    edgelm::add_operators(options);
    // Threads outlive sessions. onnxruntime closes the library with the last session, but must not unmap it.
    edgelm::stay_loaded();
  });
}
}
