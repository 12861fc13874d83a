// DepthwiseConv: a convolution with a channel a group.
//
// AVX512-VNNI: of 32 channels four rows of the window are taken in one column and their bytes interleaved, so that one
// instruction multiplies and adds the four of a channel. A column serves all windows it lies in, so those of a row of the
// picture are kept. AVX2: two taps at a time, widened to 16 bits, multiplied and added in pairs.
#include <cstdlib>
#include <cstring>

#include "convolution.hpp"

namespace edgeq {
namespace {

#if defined(__x86_64__)
constexpr size_t kLanes = 16;  // channels a block with AVX2; the last starts earlier where they don't divide

size_t blocks_of(const Convolution& self) { return (self.channels + kLanes - 1) / kLanes; }

size_t start_of(const Convolution& self, size_t block) {
  return block + 1 == blocks_of(self) ? self.channels - kLanes : block * kLanes;
}

size_t pairs(const Convolution& self) { return (self.taps + 1) / 2; }

// i16 [blocks, pairs, 16 channels as they come out of unpacking, 2 taps].
bool pack_avx2(Convolution& self, const int8_t* weights) {
  auto* packed = static_cast<int16_t*>(std::aligned_alloc(64, blocks_of(self) * pairs(self) * 64));
  self.weights = packed;
  if (!packed) return false;
  for (size_t block = 0; block < blocks_of(self); block++)
    for (size_t pair = 0; pair < pairs(self); pair++)
      for (size_t lane = 0; lane < kLanes; lane++) {
        const size_t half = lane / 8, four = lane % 8 / 4, channel = start_of(self, block) + four * 8 + half * 4 + lane % 4;
        for (size_t tap = 2 * pair; tap < 2 * pair + 2; tap++)
          *packed++ = tap < self.taps ? weights[channel * self.taps + tap] : 0;
      }
  return true;
}

EDGEQ_AVX2 __m256i rounded(__m256i sum, __m256 scale, __m256 low, __m256 high) {
  const __m256 code = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(code, low), high));
}

// Two halves of four, which lie eight apart.
EDGEQ_AVX2 __m256i apart(const void* from) {
  const auto* part = static_cast<const __m128i*>(from);
  return _mm256_set_m128i(_mm_loadu_si128(part + 2), _mm_loadu_si128(part));
}

EDGEQ_AVX2 bool run_avx2(const Convolution& self, const Picture& picture) {
  const uint8_t* bytes[kMostTaps + 1];
  bytes[self.taps] = self.padding;  // the other of the last pair
  const __m256 low = _mm256_set1_ps(-float(self.y_zero)), high = _mm256_set1_ps(255.0f - float(self.y_zero));
  const __m256i zero = _mm256_set1_epi16(self.y_zero);
  uint8_t* y = picture.y;
  for (int64_t row = picture.first_row; row < picture.end_row; row++)
    for (int64_t column = 0; column < picture.out_width; column++, y += self.channels) {
      under(self, picture, row, column, bytes);
      const auto* weights = static_cast<const __m256i*>(self.weights);
      for (size_t block = 0; block < blocks_of(self); block++) {
        const size_t start = start_of(self, block);
        __m256i first = apart(self.biases + start), second = apart(self.biases + start + 4);
        for (size_t tap = 0; tap < self.taps; tap += 2, weights += 2) {
          const __m256i one = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[tap] + start)));
          const __m256i two =
              _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[tap + 1] + start)));
          first = _mm256_add_epi32(first, _mm256_madd_epi16(_mm256_unpacklo_epi16(one, two), weights[0]));
          second = _mm256_add_epi32(second, _mm256_madd_epi16(_mm256_unpackhi_epi16(one, two), weights[1]));
        }
        first = rounded(first, _mm256_castsi256_ps(apart(self.scales + start)), low, high);
        second = rounded(second, _mm256_castsi256_ps(apart(self.scales + start + 4)), low, high);
        const __m256i codes = _mm256_add_epi16(_mm256_packs_epi32(first, second), zero);
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + start), packed);
      }
    }
  return true;
}

size_t groups_of(const Convolution& self) { return size_t(self.kernel[0] + 3) / 4; }  // of four rows of the window

size_t wide_blocks(const Convolution& self) { return (self.channels + kWide - 1) / kWide; }

// A block: f32 scales and i32 biases [4 quarters, 8 channels], i8 [columns of the window, groups, 4, 8, 4 rows].
size_t bytes_of_block(const Convolution& self) { return 256 + size_t(self.kernel[1]) * groups_of(self) * 128; }

bool pack_vnni(Convolution& self, const int8_t* weights) {
  const size_t columns = size_t(self.kernel[1]), size = bytes_of_block(self);
  auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, wide_blocks(self) * size));
  self.weights = packed;
  if (!packed) return false;
  std::memset(packed, 0, wide_blocks(self) * size);
  for (size_t block = 0; block < wide_blocks(self); block++, packed += size)
    for (size_t part = 0; part < 4; part++)
      for (size_t lane = 0; lane < 8; lane++) {
        const size_t channel = block * kWide + channel_of(part, lane), at = part * 8 + lane;
        if (channel >= self.channels) continue;
        std::memcpy(packed + 4 * at, self.scales + channel, 4);
        std::memcpy(packed + 128 + 4 * at, self.biases + channel, 4);
        for (size_t tap = 0; tap < self.taps; tap++) {
          const size_t row = tap / columns, column = tap % columns;
          packed[256 + (column * groups_of(self) + row / 4) * 128 + 4 * at + row % 4] =
              uint8_t(weights[channel * self.taps + tap]);
        }
      }
  return true;
}

// Columns and groups are known for the usual windows: the compiler unrolls them. 0: any.
template <size_t kColumns, size_t kGroups>
EDGEQ_VNNI void row_vnni(const Convolution& self, const Picture& picture, int64_t row, uint8_t* y, __m256i* columns) {
  const size_t across = kColumns ? kColumns : size_t(self.kernel[1]), groups = kGroups ? kGroups : groups_of(self);
  const __m256i zero = _mm256_set1_epi16(self.y_zero);
  const int64_t step = int64_t(self.channels), stride = self.strides[1] * int64_t(groups) * 4;
  const auto* packed = static_cast<const uint8_t*>(self.weights);
  for (size_t start = 0; start < self.channels; start += kWide, packed += bytes_of_block(self)) {
    const size_t left = self.channels - start;
    const __mmask32 kept = left >= kWide ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
    for (size_t group = 0; group < groups; group++) {
      const uint8_t* from[4];
      int64_t steps[4];
      for (int part = 0; part < 4; part++) {
        const int64_t ky = int64_t(4 * group) + part, at = row * self.strides[0] - self.pads[0] + ky;
        const bool there = ky < self.kernel[0] && at >= 0 && at < picture.height;
        from[part] = there ? picture.x + at * picture.width * step + start : self.padding + start;
        steps[part] = there ? step : 0;
      }
      __m256i* to = columns + (self.pads[1] * int64_t(groups) + int64_t(group)) * 4;
      for (int64_t x = 0; x < picture.width; x++, to += groups * 4) {
        const __m256i a = _mm256_maskz_loadu_epi8(kept, from[0]), b = _mm256_maskz_loadu_epi8(kept, from[1]);
        const __m256i c = _mm256_maskz_loadu_epi8(kept, from[2]), d = _mm256_maskz_loadu_epi8(kept, from[3]);
        const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
        const __m256i ab_high = _mm256_unpackhi_epi8(a, b), cd_high = _mm256_unpackhi_epi8(c, d);
        to[0] = _mm256_unpacklo_epi16(ab, cd);
        to[1] = _mm256_unpackhi_epi16(ab, cd);
        to[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
        to[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
        for (int part = 0; part < 4; part++) from[part] += steps[part];
      }
    }
    const auto* scales = reinterpret_cast<const __m256*>(packed);
    const auto* biases = reinterpret_cast<const __m256i*>(packed + 128);
    const auto* weights = reinterpret_cast<const __m256i*>(packed + 256);
    const __m256i* window = columns;
    uint8_t* to = y + start;
    for (int64_t column = 0; column < picture.out_width; column++, window += stride, to += step) {
      __m256i sums[4] = {biases[0], biases[1], biases[2], biases[3]};
      for (size_t tap = 0; tap < across * groups; tap++)
        for (int part = 0; part < 4; part++)
          sums[part] = _mm256_dpbusd_epi32(sums[part], window[4 * tap + part], weights[4 * tap + part]);
      _mm256_mask_storeu_epi8(to, kept, finished(sums, scales, zero));
    }
  }
}

EDGEQ_VNNI bool run_vnni(const Convolution& self, const Picture& picture) {
  const size_t size = size_t(self.pads[1] + picture.width + self.pads[3]) * groups_of(self) * 128;
  auto* columns = static_cast<__m256i*>(std::aligned_alloc(64, size));
  if (!columns) return false;
  std::memset(columns, self.x_zero, size);  // what lies beside the picture stays so
  const auto kernel = self.kernel[0] == 3 && self.kernel[1] == 3   ? row_vnni<3, 1>
                      : self.kernel[0] == 5 && self.kernel[1] == 5 ? row_vnni<5, 2>
                                                                   : row_vnni<0, 0>;
  for (int64_t row = picture.first_row; row < picture.end_row; row++) {
    const int64_t offset = (row - picture.first_row) * picture.out_width * int64_t(self.channels);
    kernel(self, picture, row, picture.y + offset, columns);
  }
  std::free(columns);
  return true;
}
#endif

Way fastest() {
#if defined(__x86_64__)
  if (has_vnni()) return {pack_vnni, run_vnni};
  if (has_avx2()) return {pack_avx2, run_avx2};
#endif
  return {};
}

const CustomOp the_op = convolution_op("DepthwiseConv", [](const CustomOp*, Api, const void* info, void** kernel) {
  return create_convolution(info, fastest(), true, kernel);
});

}  // namespace

const CustomOp* depthwise_conv() { return &the_op; }

}  // namespace edgeq
