// What convolutions of u8 codes with their channels last share: constants, shapes, tasks. See convolution.cpp.
#pragma once
#include "library.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgeq {

struct Picture {  // one of a batch, and the rows of its result that a task computes
  const uint8_t* x;
  uint8_t* y;
  int64_t height, width, out_width, first_row, end_row;
};

struct Convolution;

struct Way {  // to compute one
  bool (*pack)(Convolution& self, const int8_t* weights);  // [channels, of a group, kernel]; false: no memory
  bool (*run)(const Convolution& self, const Picture& picture);
};

struct Convolution {
  int64_t kernel[2], strides[2], pads[4];  // height and width; top, left, bottom, right
  size_t inputs = 0, channels = 0;  // channels read and written
  size_t taps = 0, depth = 0;       // numbers of a window: of one channel, and of all a sum takes
  float* scales = nullptr;          // [channels]
  int32_t* biases = nullptr;        // [channels], less what x_zero adds to every sum
  void* weights = nullptr;          // as `run` wants them
  uint8_t* padding = nullptr;       // [inputs] of x_zero
  uint8_t x_zero = 0, y_zero = 0;
  bool depthwise = false;
  Way way{};
};

constexpr size_t kFewestChannels = 16, kMostTaps = 64;

// The bytes under each tap of a window, of channel 0.
void under(const Convolution& self, const Picture& picture, int64_t row, int64_t column, const uint8_t** found);

// A kernel from a node's constants. `fast` may wrap where a code is beyond 32 bits: another way is taken there, and on
// CPUs that have none.
Status create_convolution(const void* info, Way fast, bool depthwise, void** kernel);
CustomOp convolution_op(const char* called, Status (*create)(const CustomOp*, Api, const void*, void**));

#if defined(__x86_64__)
#define EDGEQ_AVX2 __attribute__((target("avx2")))
#define EDGEQ_VNNI __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))

inline bool has_avx2() { return __builtin_cpu_supports("avx2"); }

inline bool has_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// Vectors of 32 channels lie in quarters of eight, as two levels of packing to 8 bits want them: quarter `part` holds
// four channels of each half.
constexpr size_t kWide = 32;

inline size_t channel_of(size_t part, size_t lane) { return lane / 4 * 16 + part * 4 + lane % 4; }

// The codes of 32 sums in quarters, in the order of their channels.
EDGEQ_AVX2 inline __m256i finished(const __m256i* sums, const __m256* scales, __m256i zero) {
  __m256i codes[4];
  for (int part = 0; part < 4; part++)
    codes[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[part]), scales[part]));
  const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(codes[0], codes[1]), zero);
  const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(codes[2], codes[3]), zero);
  return _mm256_packus_epi16(low, high);
}
#endif

}  // namespace edgeq
