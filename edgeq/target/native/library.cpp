// Kernels of edgeq's own for ONNX Runtime's CPU provider, as a library of custom operators.
#include "library.hpp"

namespace edgeq {

Api the_api = nullptr;

Status view(const void* value, View& seen) {
  void* info = nullptr;
  Status wrong = call(kTypeAndShape, value, &info);
  const void* asked = info;
  if (!wrong) wrong = call(kElementCount, asked, &seen.count);
  if (!wrong) wrong = call(kRank, asked, &seen.rank);
  if (!wrong && seen.rank > kMaxRank) wrong = wrong_argument("edgeq.kernels: a tensor has more than 16 axes");
  if (!wrong) wrong = call(kShape, asked, static_cast<int64_t*>(seen.shape), seen.rank);
  if (info) call<void>(kReleaseTypeAndShape, info);
  return wrong ? wrong : call(kTensorData, value, &seen.data);
}

Status input(const void* context, size_t index, View& seen) {
  const void* value = nullptr;
  Status wrong = call(kInput, context, index, &value);
  return wrong ? wrong : view(value, seen);
}

Status constant_input(const void* info, size_t index, View& seen) {
  const void* value = nullptr;
  int constant = 0;
  if (Status wrong = call(kConstantInput, info, index, &constant, &value)) return wrong;
  return constant ? view(value, seen) : wrong_argument("edgeq.kernels: an input that must be constant isn't");
}

Status output(void* context, const int64_t* shape, size_t rank, void** data) {
  void* value = nullptr;
  Status wrong = call(kOutput, context, size_t(0), shape, rank, &value);
  return wrong ? wrong : call(kTensorData, value, data);
}

Status parallel(const void* context, void (*work)(void*, size_t), size_t count, void* given) {
  return call(kParallelFor, context, work, count, size_t(0), given);
}

CustomOp::CustomOp(const char* called, const int* inputs, size_t inputs_count, int output)
    : called(called), inputs(inputs), inputs_count(inputs_count), output(output) {
  constexpr auto required = [](const CustomOp*, size_t) { return 0; };
  constexpr auto default_memory = required;
  name = [](const CustomOp* self) { return self->called; };
  provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
  input_type = [](const CustomOp* self, size_t index) { return self->inputs[index]; };
  input_count = [](const CustomOp* self) { return self->inputs_count; };
  output_type = [](const CustomOp* self, size_t) { return self->output; };
  output_count = [](const CustomOp*) { return size_t(1); };
  destroy = [](void*) {};
  input_characteristic = output_characteristic = required;
  input_memory = default_memory;
  for (auto& one : variadic) one = [](const CustomOp*) { return 1; };
  create = [](const CustomOp*, Api, const void*, void** kernel) -> Status {
    static char without_state;
    *kernel = &without_state;
    return nullptr;
  };
  first_version = [](const CustomOp*) { return 1; };
  last_version = [](const CustomOp*) { return 0x7fffffff; };
}

namespace {

struct Base {  // OrtApiBase
  Api (*table)(uint32_t version);
  const char* (*version)();
};

}  // namespace
}  // namespace edgeq

extern "C" __attribute__((visibility("default"))) edgeq::Status RegisterCustomOps(void* options,
                                                                                  const edgeq::Base* base) {
  using namespace edgeq;
  static void* domain = nullptr;  // kept as long as the program runs, as sessions read it
  the_api = base->table(kVersion);
  if (!the_api) return nullptr;  // an older runtime, which takes the functions in the model
  if (!domain) {
    if (Status wrong = call(kCreateDomain, "edgeq.kernels", &domain)) return wrong;
    const CustomOp* const ops[] = {table_of(kUint8), table_of(kInt8), depthwise_conv(), stem_conv()};
    for (const CustomOp* op : ops)
      if (Status wrong = call(kAddToDomain, domain, op)) return wrong;
  }
  return call(kAddDomain, options, domain);
}
