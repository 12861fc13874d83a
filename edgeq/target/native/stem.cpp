// StemConv: a convolution of few channels, as the first of a network is.
//
// The numbers of a row of the window lie side by side. Four of them (bytes with AVX512-VNNI; two, widened to 16 bits, with
// AVX2) are spread over a register and multiplied by those of eight channels of the result in one instruction.
#include <cstdlib>
#include <cstring>

#include "convolution.hpp"

namespace edgeq {
namespace {

#if defined(__x86_64__)
constexpr size_t kSpread = 4;  // bytes that are spread at a time: four u8 or two i16

size_t blocks_of(const Convolution& self) { return (self.channels + kWide - 1) / kWide; }

// `Number`s of a row of the window, in spreads.
template <class Number>
size_t spreads_of(const Convolution& self) {
  return (size_t(self.kernel[1]) * self.inputs * sizeof(Number) + kSpread - 1) / kSpread;
}

// A block: f32 scales and i32 biases [4 quarters, 8 channels], `Weight`s [rows of the window, spreads, 4, 8, spread].
template <class Weight>
size_t bytes_of_block(const Convolution& self) {
  return 256 + size_t(self.kernel[0]) * spreads_of<Weight>(self) * 128;
}

template <class Weight>
bool pack(Convolution& self, const int8_t* weights) {
  const size_t size = bytes_of_block<Weight>(self), each = kSpread / sizeof(Weight);
  const size_t columns = size_t(self.kernel[1]), across = columns * self.inputs;
  auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, blocks_of(self) * size));
  self.weights = packed;
  if (!packed) return false;
  std::memset(packed, 0, blocks_of(self) * size);
  for (size_t block = 0; block < blocks_of(self); block++, packed += size)
    for (size_t part = 0; part < 4; part++)
      for (size_t lane = 0; lane < 8; lane++) {
        const size_t channel = block * kWide + channel_of(part, lane), at = part * 8 + lane;
        if (channel >= self.channels) continue;
        std::memcpy(packed + 4 * at, self.scales + channel, 4);
        std::memcpy(packed + 128 + 4 * at, self.biases + channel, 4);
        for (size_t row = 0; row < size_t(self.kernel[0]); row++)
          for (size_t index = 0; index < across; index++) {
            const size_t tap = row * columns + index / self.inputs;
            const Weight weight = weights[channel * self.depth + index % self.inputs * self.taps + tap];
            uint8_t* to = packed + 256 + (row * spreads_of<Weight>(self) + index / each) * 128 + 4 * at;
            std::memcpy(to + index % each * sizeof(Weight), &weight, sizeof(Weight));
          }
      }
  return true;
}

// Rows of the picture under those of the window, padded and as `Number`s; a spread more can be read.
template <class Number>
struct Rows {
  size_t length;
  Number* all;

  Rows(const Convolution& self, const Picture& picture)
      : length(size_t(self.pads[1] + picture.width + self.pads[3]) * self.inputs),
        all(static_cast<Number*>(std::malloc(size_t(self.kernel[0]) * length * sizeof(Number) + kSpread))) {}
  ~Rows() { std::free(all); }
  Rows(const Rows&) = delete;

  void take(const Convolution& self, const Picture& picture, int64_t row) {
    const size_t beside = size_t(self.pads[1]) * self.inputs, inside = size_t(picture.width) * self.inputs;
    for (int64_t ky = 0; ky < self.kernel[0]; ky++) {
      const int64_t at = row * self.strides[0] - self.pads[0] + ky;
      const bool there = at >= 0 && at < picture.height;
      const uint8_t* from = picture.x + (there ? at : 0) * int64_t(inside);
      Number* to = all + size_t(ky) * length;
      for (size_t index = 0; index < length; index++) to[index] = self.x_zero;
      if (there)
        for (size_t index = 0; index < inside; index++) to[beside + index] = from[index];
    }
  }
};

EDGEQ_AVX2 inline __m256i spread(const void* from) {
  int32_t four;
  std::memcpy(&four, from, kSpread);
  return _mm256_set1_epi32(four);
}

EDGEQ_AVX2 inline void store(__m256i codes, uint8_t* to, size_t left) {
  if (left >= kWide)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
  else
    std::memcpy(to, &codes, left);
}

// The two ways differ in a number's type and in how products are added up.
#define EDGEQ_RUN(NAME, TARGET, NUMBER, WEIGHT, ADDED)                                                                \
  TARGET bool NAME(const Convolution& self, const Picture& picture) {                                                 \
    Rows<NUMBER> rows(self, picture);                                                                                 \
    if (!rows.all) return false;                                                                                      \
    const size_t spreads = spreads_of<NUMBER>(self), step = size_t(self.strides[1]) * self.inputs;                    \
    const __m256i zero = _mm256_set1_epi16(self.y_zero);                                                              \
    uint8_t* y = picture.y;                                                                                           \
    for (int64_t row = picture.first_row; row < picture.end_row; row++) {                                             \
      rows.take(self, picture, row);                                                                                  \
      for (int64_t column = 0; column < picture.out_width; column++, y += self.channels) {                            \
        const auto* packed = static_cast<const uint8_t*>(self.weights);                                               \
        for (size_t start = 0; start < self.channels; start += kWide, packed += bytes_of_block<WEIGHT>(self)) {       \
          const auto* biases = reinterpret_cast<const __m256i*>(packed + 128);                                        \
          const auto* weights = reinterpret_cast<const __m256i*>(packed + 256);                                       \
          __m256i sums[4] = {biases[0], biases[1], biases[2], biases[3]};                                             \
          for (size_t ky = 0; ky < size_t(self.kernel[0]); ky++) {                                                    \
            const NUMBER* from = rows.all + ky * rows.length + size_t(column) * step;                                 \
            for (size_t index = 0; index < spreads; index++, weights += 4) {                                          \
              const __m256i x = spread(from + index * (kSpread / sizeof(NUMBER)));                                    \
              for (int part = 0; part < 4; part++) sums[part] = ADDED(sums[part], x, weights[part]);                  \
            }                                                                                                         \
          }                                                                                                           \
          const auto* scales = reinterpret_cast<const __m256*>(packed);                                               \
          store(finished(sums, scales, zero), y + start, self.channels - start);                                      \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
    return true;                                                                                                      \
  }

EDGEQ_AVX2 inline __m256i added_in_pairs(__m256i sum, __m256i x, __m256i weights) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(x, weights));
}

EDGEQ_RUN(run_avx2, EDGEQ_AVX2, int16_t, int16_t, added_in_pairs)
EDGEQ_RUN(run_vnni, EDGEQ_VNNI, uint8_t, int8_t, _mm256_dpbusd_epi32)
#endif

Way fastest() {
#if defined(__x86_64__)
  if (has_vnni()) return {pack<int8_t>, run_vnni};
  if (has_avx2()) return {pack<int16_t>, run_avx2};
#endif
  return {};
}

const CustomOp the_op = convolution_op("StemConv", [](const CustomOp*, Api, const void* info, void** kernel) {
  return create_convolution(info, fastest(), false, kernel);
});

}  // namespace

const CustomOp* stem_conv() { return &the_op; }

}  // namespace edgeq
