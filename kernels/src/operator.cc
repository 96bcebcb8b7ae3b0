#include "operator.h"

#include <memory>

namespace edgelm {

const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

int within(int64_t value, int64_t least, int64_t most, const char* what) {
  if (value < least || value > most)
    throw std::runtime_error(std::string(what) + " must be between " + std::to_string(least) + " and " +
                             std::to_string(most) + ", found " + std::to_string(value));
  return static_cast<int>(value);
}

namespace {

std::vector<int64_t> shape_of(const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(api->GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  check(api->GetDimensions(info, shape.data(), rank));
  return shape;
}

std::vector<int64_t> shape_of(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api->ReleaseTensorTypeAndShapeInfo)> owned(
      info, api->ReleaseTensorTypeAndShapeInfo);
  return shape_of(info);
}

const void* data_of(const OrtValue* value) {
  void* data = nullptr;
  if (value != nullptr) check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

Tensor tensor_of(const OrtValue* value) {
  if (value == nullptr) return {};
  return {data_of(value), shape_of(value)};
}

// Null for an optional input that is not there.
const OrtValue* input_of(const OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  size_t count = 0;
  check(api->KernelContext_GetInputCount(context, &count));
  if (index >= count) return value;
  check(api->KernelContext_GetInput(context, index, &value));
  return value;
}

// Whether an attribute is there: a status is the only answer that the interface gives.
bool is_there(OrtStatus* status) {
  if (status != nullptr) api->ReleaseStatus(status);
  return status == nullptr;
}

}  // namespace

int64_t Info::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  return is_there(api->KernelInfoGetAttribute_int64(info_, name, &value)) ? value : otherwise;
}

float Info::number(const char* name, float otherwise) const {
  float value = 0;
  return is_there(api->KernelInfoGetAttribute_float(info_, name, &value)) ? value : otherwise;
}

std::string Info::text(const char* name, const char* otherwise) const {
  size_t size = 0;
  if (!is_there(api->KernelInfoGetAttribute_string(info_, name, nullptr, &size))) return otherwise;
  std::string value(size, '\0');
  check(api->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
  value.resize(size - 1);  // the terminating zero
  return value;
}

Tensor Info::constant(size_t index) const {
  int is_constant = 0;
  size_t count = 0;
  check(api->KernelInfo_GetInputCount(info_, &count));
  if (index >= count) throw std::runtime_error("input " + std::to_string(index) + " must be there");
  const OrtValue* value = nullptr;
  check(api->KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (!is_constant) throw std::runtime_error("input " + std::to_string(index) + " must be constant");
  return tensor_of(value);
}

std::vector<int64_t> Info::shape(size_t index) const {
  OrtTypeInfo* type = nullptr;
  size_t count = 0;
  check(api->KernelInfo_GetInputCount(info_, &count));
  if (index >= count) throw std::runtime_error("input " + std::to_string(index) + " must be there");
  check(api->KernelInfo_GetInputTypeInfo(info_, index, &type));
  const std::unique_ptr<OrtTypeInfo, decltype(api->ReleaseTypeInfo)> owned(type, api->ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  check(api->CastTypeInfoToTensorInfo(type, &tensor));
  return shape_of(tensor);
}

Tensor Call::input(size_t index, bool optional) const {
  const OrtValue* const value = input_of(context_, index);
  if (value == nullptr && !optional) throw std::runtime_error("input " + std::to_string(index) + " must be there");
  return tensor_of(value);
}

bool Call::has(size_t index) const { return input_of(context_, index) != nullptr; }

void* Call::output_data(size_t index, const std::vector<int64_t>& shape) {
  OrtValue* value = nullptr;
  size_t count = 0;
  check(api->KernelContext_GetOutputCount(context_, &count));
  if (index < count) check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  if (value == nullptr) throw std::runtime_error("output " + std::to_string(index) + " must be there");
  void* data = nullptr;
  check(api->GetTensorMutableData(value, &data));
  return data;
}

float* scratch(int part, size_t floats) {
  thread_local std::vector<float> memory[2];
  if (memory[part].size() < floats) memory[part].resize(floats);
  return memory[part].data();
}

}  // namespace edgelm
