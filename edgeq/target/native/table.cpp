// Table: codes and 256 codes -> Y[i] = T[X[i]], where X is read as bytes. A function of 8-bit codes has 256 values;
// the runtime computes it element by element with a kernel or more. Four vector registers hold the table where the CPU
// permutes bytes across them (AVX512-VBMI), sixteen pairs of shuffles look it up with AVX2, four lookups with NEON.
#include "library.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace edgeq {
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
  __builtin_cpu_init();  // this runs when the library is loaded
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw")) return look_up_vbmi;
  if (__builtin_cpu_supports("avx2")) return look_up_avx2;
#elif defined(__aarch64__)
  return look_up_neon;
#endif
  return look_up;
}

constexpr size_t kCodes = 256, kBlock = 1 << 17;  // bytes that are worth a thread of their own
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

Status compute(void*, void* context) {
  View x, table;
  void* y = nullptr;
  Status wrong = input(context, 0, x);
  if (!wrong) wrong = input(context, 1, table);
  if (!wrong && table.count != kCodes) wrong = wrong_argument("edgeq.kernels.Table: T must hold 256 codes");
  if (!wrong) wrong = output(context, x.shape, x.rank, &y);
  if (wrong) return wrong;
  Work work{x.as<uint8_t>(), static_cast<uint8_t*>(y), table.as<uint8_t>(), x.count};
  if (x.count >= 2 * kBlock) return parallel(context, block, (x.count + kBlock - 1) / kBlock, &work);
  the_lookup(work.x, work.y, work.count, work.table);
  return nullptr;
}

Status infer_shape(const CustomOp*, void* context) {
  void* info = nullptr;
  size_t rank = 0;
  Status wrong = call(kInputTypeShape, static_cast<const void*>(context), size_t(0), &info);
  if (!wrong) wrong = call(kRank, static_cast<const void*>(info), &rank);
  if (wrong || !rank) return wrong;  // a shape that isn't known looks like a scalar's
  return call(kSetOutputTypeShape, context, size_t(0), static_cast<const void*>(info));
}

size_t in_place(int** inputs, int** outputs) {
  static int first = 0;
  *inputs = *outputs = &first;
  return 1;
}

CustomOp made(const int* types) {
  CustomOp op("Table", types, 2, types[0]);
  op.compute = compute;
  op.infer_shape = infer_shape;
  op.in_place = in_place;
  op.release_in_place = [](int*, int*) {};
  return op;
}

constexpr int kTypes[2][2] = {{kUint8, kUint8}, {kInt8, kInt8}};
const CustomOp the_ops[2] = {made(kTypes[0]), made(kTypes[1])};

}  // namespace

const CustomOp* table_of(int type) { return &the_ops[type == kInt8]; }

}  // namespace edgeq
