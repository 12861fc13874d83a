// DepthwiseConv: QLinearConv with a channel a group, u8 codes with their channels last and i8 weights without zero point.
//
//   acc = bias + sum (x - x_zero) w,   y = saturate(round(acc * (x_scale * w_scale / y_scale)) + y_zero)
//
// with the runtime's arithmetic, so its bits: 32-bit sums, a product with one f32, rounding to even. Padding counts as
// x_zero. Weights are constants, laid out when the session starts for the instructions the CPU has:
//
// AVX512-VNNI: of 32 channels four rows of the window are taken in one column and their bytes interleaved, so that one
// instruction multiplies and adds the four of a channel. A column serves all windows it lies in, so those of a row of the
// picture are kept. AVX2: two taps at a time, widened to 16 bits, multiplied and added in pairs.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "library.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgeq {
namespace {

constexpr size_t kLanes = 16;  // channels a block; the last block starts earlier where they don't divide
constexpr size_t kMaxTaps = 64;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, to even
constexpr size_t kTaskTaps = 1 << 18;  // multiplications that are worth a task

struct Picture {  // one of a batch, and the rows of its result that a task computes
  const uint8_t* x;
  uint8_t* y;
  int64_t height, width, out_width, first_row, end_row;
};

struct Depthwise;
using Pack = bool (*)(Depthwise& self, const int8_t* weights);  // [channels, kernel]; false: no memory
using Run = bool (*)(const Depthwise& self, const Picture& picture);

struct Way {
  Pack pack;
  Run run;
};

struct Depthwise {
  int64_t kernel[2], strides[2], pads[4];  // height and width; top, left, bottom, right
  size_t channels = 0, blocks = 0, taps = 0, groups = 0;  // groups: of four rows of the window
  float* scales = nullptr;       // [channels]
  int32_t* biases = nullptr;     // [channels], less what x_zero adds to every sum
  void* weights = nullptr;       // as `run` wants them
  uint8_t* padding = nullptr;    // [channels] of x_zero
  uint8_t x_zero = 0, y_zero = 0;
  Way way{};

  size_t start(size_t block) const { return block + 1 == blocks ? channels - kLanes : block * kLanes; }
};

// The bytes under each tap of a window, of channel 0.
void under(const Depthwise& self, const Picture& picture, int64_t row, int64_t column, const uint8_t** found) {
  for (int64_t ky = 0; ky < self.kernel[0]; ky++)
    for (int64_t kx = 0; kx < self.kernel[1]; kx++) {
      const int64_t y = row * self.strides[0] - self.pads[0] + ky, x = column * self.strides[1] - self.pads[1] + kx;
      const bool inside = y >= 0 && y < picture.height && x >= 0 && x < picture.width;
      *found++ = inside ? picture.x + (y * picture.width + x) * int64_t(self.channels) : self.padding;
    }
}

bool pack_plain(Depthwise& self, const int8_t* weights) {
  self.weights = std::malloc(self.channels * self.taps);
  if (self.weights) std::memcpy(self.weights, weights, self.channels * self.taps);
  return self.weights != nullptr;
}

bool run_plain(const Depthwise& self, const Picture& picture) {
  const uint8_t* bytes[kMaxTaps];
  const auto* weights = static_cast<const int8_t*>(self.weights);
  uint8_t* y = picture.y;
  for (int64_t row = picture.first_row; row < picture.end_row; row++)
    for (int64_t column = 0; column < picture.out_width; column++) {
      under(self, picture, row, column, bytes);
      for (size_t channel = 0; channel < self.channels; channel++) {
        int32_t sum = self.biases[channel];
        for (size_t tap = 0; tap < self.taps; tap++)
          sum += int32_t(bytes[tap][channel]) * weights[channel * self.taps + tap];
        float code = float(sum) * self.scales[channel];
        const float low = -float(self.y_zero), high = 255.0f - float(self.y_zero);
        code = code < low ? low : code > high ? high : code;
        *y++ = uint8_t(int32_t((code + kRound) - kRound) + self.y_zero);
      }
    }
  return true;
}

#if defined(__x86_64__)
#define EDGEQ_AVX2 __attribute__((target("avx2")))
#define EDGEQ_VNNI __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))

size_t pairs(const Depthwise& self) { return (self.taps + 1) / 2; }

// i16 [blocks, pairs, 16 channels as they come out of unpacking, 2 taps].
bool pack_avx2(Depthwise& self, const int8_t* weights) {
  auto* packed = static_cast<int16_t*>(std::aligned_alloc(64, self.blocks * pairs(self) * 64));
  self.weights = packed;
  if (!packed) return false;
  for (size_t block = 0; block < self.blocks; block++)
    for (size_t pair = 0; pair < pairs(self); pair++)
      for (size_t lane = 0; lane < kLanes; lane++) {
        const size_t half = lane / 8, four = lane % 8 / 4, channel = self.start(block) + four * 8 + half * 4 + lane % 4;
        for (size_t tap = 2 * pair; tap < 2 * pair + 2; tap++)
          *packed++ = tap < self.taps ? weights[channel * self.taps + tap] : 0;
      }
  return true;
}

EDGEQ_AVX2 __m256i coded(__m256i sum, __m256 scale, __m256 low, __m256 high) {
  const __m256 code = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(code, low), high));
}

// Two halves of four, which lie eight apart.
EDGEQ_AVX2 __m256i apart(const void* from) {
  const auto* part = static_cast<const __m128i*>(from);
  return _mm256_set_m128i(_mm_loadu_si128(part + 2), _mm_loadu_si128(part));
}

EDGEQ_AVX2 bool run_avx2(const Depthwise& self, const Picture& picture) {
  const uint8_t* bytes[kMaxTaps + 1];
  bytes[self.taps] = self.padding;  // the other of the last pair
  const __m256 low = _mm256_set1_ps(-float(self.y_zero)), high = _mm256_set1_ps(255.0f - float(self.y_zero));
  const __m256i zero = _mm256_set1_epi16(self.y_zero);
  uint8_t* y = picture.y;
  for (int64_t row = picture.first_row; row < picture.end_row; row++)
    for (int64_t column = 0; column < picture.out_width; column++, y += self.channels) {
      under(self, picture, row, column, bytes);
      const auto* weights = static_cast<const __m256i*>(self.weights);
      for (size_t block = 0; block < self.blocks; block++) {
        const size_t start = self.start(block);
        __m256i first = apart(self.biases + start), second = apart(self.biases + start + 4);
        for (size_t tap = 0; tap < self.taps; tap += 2, weights += 2) {
          const __m256i one = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[tap] + start)));
          const __m256i two =
              _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[tap + 1] + start)));
          first = _mm256_add_epi32(first, _mm256_madd_epi16(_mm256_unpacklo_epi16(one, two), weights[0]));
          second = _mm256_add_epi32(second, _mm256_madd_epi16(_mm256_unpackhi_epi16(one, two), weights[1]));
        }
        first = coded(first, _mm256_castsi256_ps(apart(self.scales + start)), low, high);
        second = coded(second, _mm256_castsi256_ps(apart(self.scales + start + 4)), low, high);
        const __m256i codes = _mm256_add_epi16(_mm256_packs_epi32(first, second), zero);
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + start), packed);
      }
    }
  return true;
}

constexpr size_t kWide = 32;  // channels a block

size_t wide_blocks(const Depthwise& self) { return (self.channels + kWide - 1) / kWide; }

// Interleaving works on halves of a register: its quarter `part` holds four channels of each half.
size_t interleaved(size_t part, size_t lane) { return lane / 4 * 16 + part * 4 + lane % 4; }

// A block: f32 scales and i32 biases [4 quarters, 8 channels], i8 [columns of the window, groups, 4, 8, 4 rows].
size_t bytes_of_block(const Depthwise& self) { return 256 + size_t(self.kernel[1]) * self.groups * 128; }

bool pack_vnni(Depthwise& self, const int8_t* weights) {
  const size_t columns = size_t(self.kernel[1]), size = bytes_of_block(self);
  auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, wide_blocks(self) * size));
  self.weights = packed;
  if (!packed) return false;
  std::memset(packed, 0, wide_blocks(self) * size);
  for (size_t block = 0; block < wide_blocks(self); block++, packed += size)
    for (size_t part = 0; part < 4; part++)
      for (size_t lane = 0; lane < 8; lane++) {
        const size_t channel = block * kWide + interleaved(part, lane), at = part * 8 + lane;
        if (channel >= self.channels) continue;
        std::memcpy(packed + 4 * at, self.scales + channel, 4);
        std::memcpy(packed + 128 + 4 * at, self.biases + channel, 4);
        for (size_t tap = 0; tap < self.taps; tap++) {
          const size_t row = tap / columns, column = tap % columns;
          packed[256 + (column * self.groups + row / 4) * 128 + 4 * at + row % 4] =
              uint8_t(weights[channel * self.taps + tap]);
        }
      }
  return true;
}

// Columns and groups are known for the usual windows: the compiler unrolls them. 0: any.
template <size_t kColumns, size_t kGroups>
EDGEQ_VNNI void row_vnni(const Depthwise& self, const Picture& picture, int64_t row, uint8_t* y, __m256i* columns) {
  const size_t across = kColumns ? kColumns : size_t(self.kernel[1]), groups = kGroups ? kGroups : self.groups;
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
      for (int part = 0; part < 4; part++)
        sums[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[part]), scales[part]));
      const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(sums[0], sums[1]), zero);
      const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(sums[2], sums[3]), zero);
      _mm256_mask_storeu_epi8(to, kept, _mm256_packus_epi16(low, high));
    }
  }
}

EDGEQ_VNNI bool run_vnni(const Depthwise& self, const Picture& picture) {
  const size_t size = size_t(self.pads[1] + picture.width + self.pads[3]) * self.groups * 128;
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
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return {pack_vnni, run_vnni};
  if (__builtin_cpu_supports("avx2")) return {pack_avx2, run_avx2};
#endif
  return {pack_plain, run_plain};
}

const Way the_way = fastest();

void destroy(void* kernel) {
  auto* self = static_cast<Depthwise*>(kernel);
  std::free(self->scales);
  std::free(self->biases);
  std::free(self->weights);
  std::free(self->padding);
  std::free(self);
}

Status fill(Depthwise& self, const void* info) {
  View x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias;
  View* constants[] = {&x_scale, &x_zero, &w, &w_scale, &w_zero, &y_scale, &y_zero, &bias};
  for (size_t index = 0; index < 8; index++)
    if (Status wrong = constant_input(info, index + 1, *constants[index])) return wrong;
  struct { const char* name; int64_t* place; size_t count; } rows[] = {
      {"kernel_shape", self.kernel, 2}, {"strides", self.strides, 2}, {"pads", self.pads, 4}};
  for (auto& row : rows) {
    size_t count = row.count;
    if (Status wrong = call(kIntegers, info, row.name, row.place, &count)) return wrong;
    if (count != row.count) return wrong_argument("edgeq.kernels.DepthwiseConv: it takes windows of two axes");
  }
  self.way = the_way;
  self.channels = size_t(w.shape[0]);
  self.taps = size_t(self.kernel[0] * self.kernel[1]);
  self.groups = size_t(self.kernel[0] + 3) / 4;
  self.blocks = (self.channels + kLanes - 1) / kLanes;
  if (self.channels < kLanes || self.taps > kMaxTaps || w.count != self.channels * self.taps ||
      bias.count != self.channels || (w_scale.count != 1 && w_scale.count != self.channels))
    return wrong_argument("edgeq.kernels.DepthwiseConv: weights [channels >= 16, 1, kernel] and a bias a channel");
  for (size_t index = 0; index < w_zero.count; index++)
    if (w_zero.as<int8_t>()[index]) return wrong_argument("edgeq.kernels.DepthwiseConv: weights without zero point");
  self.x_zero = *x_zero.as<uint8_t>();
  self.y_zero = *y_zero.as<uint8_t>();
  self.scales = static_cast<float*>(std::malloc(self.channels * sizeof(float)));
  self.biases = static_cast<int32_t*>(std::malloc(self.channels * sizeof(int32_t)));
  self.padding = static_cast<uint8_t*>(std::malloc(self.channels));
  if (!self.scales || !self.biases || !self.padding) return wrong_argument("edgeq.kernels.DepthwiseConv: no memory");
  std::memset(self.padding, self.x_zero, self.channels);
  for (size_t channel = 0; channel < self.channels; channel++) {
    const float scale = w_scale.as<float>()[w_scale.count == 1 ? 0 : channel];
    self.scales[channel] = *x_scale.as<float>() * scale / *y_scale.as<float>();
    int32_t sum = 0;
    for (size_t tap = 0; tap < self.taps; tap++) sum += w.as<int8_t>()[channel * self.taps + tap];
    self.biases[channel] = bias.as<int32_t>()[channel] - self.x_zero * sum;
    const float most = (float(self.taps) * 255 * 128 + std::fabs(float(self.biases[channel]))) * self.scales[channel];
    if (!(most < float(1 << 30))) self.way = {pack_plain, run_plain};  // a code beyond 32 bits wraps in the others
  }
  return self.way.pack(self, w.as<int8_t>()) ? nullptr : wrong_argument("edgeq.kernels.DepthwiseConv: no memory");
}

Status create(const CustomOp*, Api, const void* info, void** kernel) {
  auto* self = static_cast<Depthwise*>(std::calloc(1, sizeof(Depthwise)));
  if (!self) return wrong_argument("edgeq.kernels.DepthwiseConv: no memory");
  Status wrong = fill(*self, info);
  if (wrong)
    destroy(self);
  else
    *kernel = self;
  return wrong;
}

struct Work {
  const Depthwise* self;
  const uint8_t* x;
  uint8_t* y;
  int64_t height, width, out_height, out_width, rows, tasks;  // rows of a task; tasks of a picture
  bool failed;
};

void task(void* given, size_t index) {
  auto& work = *static_cast<Work*>(given);
  const int64_t picture = int64_t(index) / work.tasks, first = int64_t(index) % work.tasks * work.rows;
  const int64_t end = first + work.rows < work.out_height ? first + work.rows : work.out_height;
  const int64_t channels = int64_t(work.self->channels);
  const uint8_t* x = work.x + picture * work.height * work.width * channels;
  uint8_t* y = work.y + (picture * work.out_height + first) * work.out_width * channels;
  if (!work.self->way.run(*work.self, {x, y, work.height, work.width, work.out_width, first, end})) work.failed = true;
}

Status compute(void* kernel, void* context) {
  const auto& self = *static_cast<const Depthwise*>(kernel);
  View x;
  void* y = nullptr;
  if (Status wrong = input(context, 0, x)) return wrong;
  if (x.rank != 4 || size_t(x.shape[3]) != self.channels)
    return wrong_argument("edgeq.kernels.DepthwiseConv: X must be [batch, height, width, channels of the weights]");
  int64_t shape[4] = {x.shape[0], 0, 0, x.shape[3]};
  for (int axis = 0; axis < 2; axis++) {
    const int64_t room = x.shape[1 + axis] + self.pads[axis] + self.pads[2 + axis] - self.kernel[axis];
    if (room < 0) return wrong_argument("edgeq.kernels.DepthwiseConv: X is smaller than the window");
    shape[1 + axis] = room / self.strides[axis] + 1;
  }
  if (Status wrong = output(context, shape, 4, &y)) return wrong;
  const int64_t of_a_row = shape[2] * int64_t(self.channels * self.taps);
  const int64_t wanted = of_a_row ? (int64_t(kTaskTaps) + of_a_row - 1) / of_a_row : 1;
  const int64_t rows = wanted < shape[1] ? wanted : shape[1] ? shape[1] : 1;
  Work work{&self,    x.as<uint8_t>(), static_cast<uint8_t*>(y), x.shape[1], x.shape[2], shape[1], shape[2],
            rows, (shape[1] + rows - 1) / rows, false};
  const size_t tasks = size_t(shape[0] * work.tasks);
  Status wrong = nullptr;
  if (tasks > 1)
    wrong = parallel(context, task, tasks, &work);
  else if (tasks == 1)
    task(&work, 0);
  return wrong ? wrong : work.failed ? wrong_argument("edgeq.kernels.DepthwiseConv: no memory") : nullptr;
}

constexpr int kTypes[] = {kUint8, kFloat, kUint8, kInt8, kFloat, kInt8, kFloat, kUint8, kInt32};
const CustomOp the_op = [] {
  CustomOp made("DepthwiseConv", kTypes, 9, kUint8);
  made.create = create;
  made.compute = compute;
  made.destroy = destroy;
  return made;
}();

}  // namespace

const CustomOp* depthwise_conv() { return &the_op; }

}  // namespace edgeq
