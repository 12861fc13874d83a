// Kernels of edgeq's own for ONNX Runtime's CPU provider, as a library of custom operators.
//
// Table: codes and 256 codes -> Y[i] = T[X[i]], where X is read as bytes. A function of 8-bit codes has 256 values;
// the runtime computes it element by element with a kernel or more. Four vector registers hold the table where the CPU
// permutes bytes across them (AVX512-VBMI), sixteen pairs of shuffles look it up with AVX2, four lookups with NEON.
//
// No header of the runtime is needed: its table of functions only ever grows, and the places used here, as well as the
// layout of OrtCustomOp, were checked against the header of 1.32.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using Lookup = void (*)(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table);

void look_up(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  for (size_t i = 0; i < count; i++) y[i] = table[x[i]];
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void look_up_avx2(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  __m256i rows[16];  // of 16 codes, in both halves
  for (int row = 0; row < 16; row++)
    rows[row] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * row)));
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    // A shuffle gives 0 where its index has the top bit, so each row answers for its own codes alone: minus 16 row, plus
    // 112 with saturation, an index of 0 to 15 becomes 112 to 127, and all others 128 to 255.
    __m256i found = _mm256_setzero_si256();
    for (int row = 0; row < 16; row++) {
      const __m256i index = _mm256_sub_epi8(codes, _mm256_set1_epi8(char(16 * row)));
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(rows[row], _mm256_adds_epu8(index, _mm256_set1_epi8(112))));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), found);
  }
  look_up(x + i, y + i, count - i, table);
}

__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void look_up_vbmi(const uint8_t* x, uint8_t* y, size_t count,
                                                                          const uint8_t* table) {
  const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 64);
  const __m512i third = _mm512_loadu_si512(table + 128), fourth = _mm512_loadu_si512(table + 192);
  for (size_t i = 0; i < count; i += 64) {
    const __mmask64 kept = count - i >= 64 ? ~__mmask64(0) : (__mmask64(1) << (count - i)) - 1;
    const __m512i codes = _mm512_maskz_loadu_epi8(kept, x + i);
    const __m512i low = _mm512_permutex2var_epi8(first, codes, second);
    const __m512i high = _mm512_permutex2var_epi8(third, codes, fourth);
    _mm512_mask_storeu_epi8(y + i, kept, _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high));
  }
}
#elif defined(__aarch64__)
void look_up_neon(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  uint8x16x4_t quarters[4];
  for (int quarter = 0; quarter < 4; quarter++) quarters[quarter] = vld1q_u8_x4(table + 64 * quarter);
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const uint8x16_t codes = vld1q_u8(x + i);
    uint8x16_t found = vqtbl4q_u8(quarters[0], codes);  // 0 where the index is 64 or more
    for (int quarter = 1; quarter < 4; quarter++)
      found = vqtbx4q_u8(found, quarters[quarter], vsubq_u8(codes, vdupq_n_u8(uint8_t(64 * quarter))));
    vst1q_u8(y + i, found);
  }
  look_up(x + i, y + i, count - i, table);
}
#endif

Lookup fastest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw")) return look_up_vbmi;
  if (__builtin_cpu_supports("avx2")) return look_up_avx2;
#elif defined(__aarch64__)
  return look_up_neon;
#endif
  return look_up;
}

// ONNX Runtime's C interface.
using Status = void*;        // OrtStatus*, null for success
using Api = void* const*;    // OrtApi, as a table
constexpr uint32_t kVersion = 18;  // of the table: has ParallelFor
constexpr int kInvalidArgument = 2, kUint8 = 2, kInt8 = 3, kRequired = 0, kDefaultMemory = 0;
constexpr size_t kCodes = 256, kMaxRank = 16, kBlock = 1 << 17;  // bytes that are worth a thread of their own

enum Slot {
  kCreateStatus = 0, kCreateDomain = 26, kAddToDomain = 27, kAddDomain = 28, kTensorData = 51, kRank = 61, kShape = 62,
  kElementCount = 64, kTypeAndShape = 65, kInput = 90, kOutput = 91, kReleaseTypeAndShape = 99, kInputTypeShape = 268,
  kSetOutputTypeShape = 270, kParallelFor = 274,
};

template <class Result, class... Arguments>
Result call(Api api, Slot slot, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(api[slot])(arguments...);
}

struct CustomOp {  // OrtCustomOp
  uint32_t version = kVersion;
  void* (*create_kernel)(const CustomOp*, Api, const void*) = nullptr;  // V2 is used instead
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute_kernel)(void*, void*) = nullptr;  // V2 is used instead
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic[4])(const CustomOp*) = {};
  Status (*create)(const CustomOp*, Api, const void*, void**);
  Status (*compute)(void*, void*);
  Status (*infer_shape)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  size_t (*in_place)(int**, int**);
  void (*release_in_place)(int*, int*);
  size_t (*alias)(int**, int**) = nullptr;
  void (*release_alias)(int*, int*) = nullptr;
  int type;  // ours, behind what the runtime reads
};

Api the_api = nullptr;
const Lookup the_lookup = fastest();

struct Work {
  const uint8_t* x;
  uint8_t* y;
  const uint8_t* table;
  size_t count;
};

void block(void* given, size_t index) {
  const Work& work = *static_cast<Work*>(given);
  const size_t start = index * kBlock;
  const size_t count = work.count - start < kBlock ? work.count - start : kBlock;
  the_lookup(work.x + start, work.y + start, count, work.table);
}

// A tensor's bytes, its count of elements and, where asked for, its shape.
Status look(const void* value, const uint8_t** data, size_t* count, int64_t* shape = nullptr, size_t* rank = nullptr) {
  void* info = nullptr;
  Status wrong = call<Status>(the_api, kTypeAndShape, value, &info);
  if (!wrong) wrong = call<Status>(the_api, kElementCount, static_cast<const void*>(info), count);
  if (!wrong && rank) wrong = call<Status>(the_api, kRank, static_cast<const void*>(info), rank);
  if (!wrong && rank && *rank > kMaxRank)
    wrong = call<Status>(the_api, kCreateStatus, kInvalidArgument, "edgeq.kernels.Table: X has more than 16 axes");
  if (!wrong && rank) wrong = call<Status>(the_api, kShape, static_cast<const void*>(info), shape, *rank);
  if (info) call<void>(the_api, kReleaseTypeAndShape, info);
  return wrong ? wrong : call<Status>(the_api, kTensorData, value, data);
}

Status compute(void*, void* context) {
  const void *x = nullptr, *table = nullptr;
  void* y = nullptr;
  int64_t shape[kMaxRank];
  size_t rank = 0, codes = 0;
  Work work{};
  Status wrong = call<Status>(the_api, kInput, static_cast<const void*>(context), size_t(0), &x);
  if (!wrong) wrong = call<Status>(the_api, kInput, static_cast<const void*>(context), size_t(1), &table);
  if (!wrong) wrong = look(x, &work.x, &work.count, shape, &rank);
  if (!wrong) wrong = look(table, &work.table, &codes);
  if (!wrong && codes != kCodes)
    wrong = call<Status>(the_api, kCreateStatus, kInvalidArgument, "edgeq.kernels.Table: T must hold 256 codes");
  if (!wrong) wrong = call<Status>(the_api, kOutput, context, size_t(0), static_cast<const int64_t*>(shape), rank, &y);
  if (!wrong) wrong = call<Status>(the_api, kTensorData, y, &work.y);
  if (wrong) return wrong;
  if (work.count < 2 * kBlock) {
    the_lookup(work.x, work.y, work.count, work.table);
    return nullptr;
  }
  const size_t blocks = (work.count + kBlock - 1) / kBlock;
  return call<Status>(the_api, kParallelFor, static_cast<const void*>(context), &block, blocks, size_t(0),
                      static_cast<void*>(&work));
}

Status infer_shape(const CustomOp*, void* context) {
  void* info = nullptr;
  Status wrong = call<Status>(the_api, kInputTypeShape, static_cast<const void*>(context), size_t(0), &info);
  return wrong ? wrong : call<Status>(the_api, kSetOutputTypeShape, context, size_t(0), static_cast<const void*>(info));
}

size_t in_place(int** inputs, int** outputs) {
  static int first = 0;
  *inputs = *outputs = &first;
  return 1;
}

CustomOp table_of(int type) {
  CustomOp op{};
  op.name = [](const CustomOp*) { return "Table"; };
  op.provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.input_type = op.output_type = [](const CustomOp* self, size_t) { return self->type; };
  op.input_count = [](const CustomOp*) { return size_t(2); };
  op.output_count = [](const CustomOp*) { return size_t(1); };
  op.destroy = [](void*) {};
  op.input_characteristic = op.output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.input_memory = [](const CustomOp*, size_t) { return kDefaultMemory; };
  for (auto& variadic : op.variadic) variadic = [](const CustomOp*) { return 1; };
  op.create = [](const CustomOp*, Api, const void*, void** kernel) -> Status {
    static char without_state;
    *kernel = &without_state;
    return nullptr;
  };
  op.compute = compute;
  op.infer_shape = infer_shape;
  op.first_version = [](const CustomOp*) { return 1; };
  op.last_version = [](const CustomOp*) { return 0x7fffffff; };
  op.in_place = in_place;
  op.release_in_place = [](int*, int*) {};
  op.type = type;
  return op;
}

struct Base {  // OrtApiBase
  Api (*table)(uint32_t version);
  const char* (*version)();
};

}  // namespace

extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(void* options, const Base* base) {
  static const CustomOp tables[] = {table_of(kUint8), table_of(kInt8)};
  static void* domain = nullptr;  // kept as long as the program runs, as sessions read it
  the_api = base->table(kVersion);
  if (!domain) {
    if (Status wrong = call<Status>(the_api, kCreateDomain, "edgeq.kernels", &domain)) return wrong;
    for (const CustomOp& op : tables)
      if (Status wrong = call<Status>(the_api, kAddToDomain, domain, &op)) return wrong;
  }
  return call<Status>(the_api, kAddDomain, options, domain);
}
