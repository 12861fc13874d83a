// ONNX Runtime's C interface, as far as custom operators need it, and what they share.
//
// No header of the runtime is needed: its table of functions only ever grows, and the places used here, as well as the
// layout of OrtCustomOp, were checked against the header of 1.32.
#pragma once
#include <cstddef>
#include <cstdint>

namespace edgeq {

using Status = void*;      // OrtStatus*, null for success
using Api = void* const*;  // OrtApi, as a table
constexpr uint32_t kVersion = 18;  // of the table: has ParallelFor
constexpr int kInvalidArgument = 2;
constexpr int kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6;  // ONNXTensorElementDataType
constexpr size_t kMaxRank = 16;

enum Slot {
  kCreateStatus = 0, kCreateDomain = 26, kAddToDomain = 27, kAddDomain = 28, kTensorData = 51, kRank = 61, kShape = 62,
  kElementCount = 64, kTypeAndShape = 65, kInput = 90, kOutput = 91, kReleaseTypeAndShape = 99, kIntegers = 163,
  kConstantInput = 249, kInputTypeShape = 268, kSetOutputTypeShape = 270, kParallelFor = 274,
};

extern Api the_api;  // set when the library is registered

template <class Result = Status, class... Arguments>
Result call(Slot slot, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(the_api[slot])(arguments...);
}

inline Status wrong_argument(const char* words) { return call(kCreateStatus, kInvalidArgument, words); }

// A tensor that lives as long as this does.
struct View {
  const void* data = nullptr;
  size_t count = 0, rank = 0;
  int64_t shape[kMaxRank];

  template <class T>
  const T* as() const { return static_cast<const T*>(data); }
};

Status view(const void* value, View& seen);
Status input(const void* context, size_t index, View& seen);           // of a run
Status constant_input(const void* info, size_t index, View& seen);     // of a node; its data lives as long as the kernel
Status output(void* context, const int64_t* shape, size_t rank, void** data);
// `work(given, index)` for each index below `count`, on the threads of the session.
Status parallel(const void* context, void (*work)(void* given, size_t index), size_t count, void* given);

// An operator that runs on the CPU; OrtCustomOp.
struct CustomOp {
  uint32_t version = kVersion;
  void* (*create_kernel)(const CustomOp*, Api, const void*) = nullptr;  // `create` is used instead
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute_kernel)(void*, void*) = nullptr;  // `compute` is used instead
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic[4])(const CustomOp*);
  Status (*create)(const CustomOp*, Api, const void* info, void** kernel);
  Status (*compute)(void* kernel, void* context);
  Status (*infer_shape)(const CustomOp*, void*) = nullptr;
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  size_t (*in_place)(int** inputs, int** outputs) = nullptr;
  void (*release_in_place)(int*, int*) = nullptr;
  size_t (*alias)(int**, int**) = nullptr;
  void (*release_alias)(int*, int*) = nullptr;
  // Ours, behind what the runtime reads.
  const char* called;
  const int* inputs;  // types
  size_t inputs_count;
  int output;

  CustomOp(const char* called, const int* inputs, size_t inputs_count, int output);
};

// The operators, a file each.
const CustomOp* table_of(int type);
const CustomOp* depthwise_conv();
const CustomOp* stem_conv();

}  // namespace edgeq
