// Convolutions are QLinearConv with u8 codes whose channels are last and i8 weights without zero point:
//
//   acc = bias + sum (x - x_zero) w,   y = saturate(round(acc * (x_scale * w_scale / y_scale)) + y_zero)
//
// with the runtime's arithmetic, so its bits: 32-bit sums, a product with one f32, rounding to even. Padding counts as
// x_zero. Weights are constants, laid out when the session starts for the instructions the CPU has.
#include "convolution.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace edgeq {
namespace {

constexpr size_t kTaskTaps = 1 << 18;  // multiplications that are worth a task
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, to even

bool pack_plain(Convolution& self, const int8_t* weights) {
  self.weights = std::malloc(self.channels * self.depth);
  if (self.weights) std::memcpy(self.weights, weights, self.channels * self.depth);
  return self.weights != nullptr;
}

bool run_plain(const Convolution& self, const Picture& picture) {
  const uint8_t* bytes[kMostTaps];
  const float low = -float(self.y_zero), high = 255.0f - float(self.y_zero);
  uint8_t* y = picture.y;
  for (int64_t row = picture.first_row; row < picture.end_row; row++)
    for (int64_t column = 0; column < picture.out_width; column++) {
      under(self, picture, row, column, bytes);
      const auto* weight = static_cast<const int8_t*>(self.weights);
      for (size_t channel = 0; channel < self.channels; channel++) {
        int32_t sum = self.biases[channel];
        const size_t first = self.depthwise ? channel : 0;
        for (size_t from = first; from < first + self.depth / self.taps; from++)
          for (size_t tap = 0; tap < self.taps; tap++) sum += int32_t(bytes[tap][from]) * *weight++;
        float code = float(sum) * self.scales[channel];
        code = code < low ? low : code > high ? high : code;
        *y++ = uint8_t(int32_t((code + kRound) - kRound) + self.y_zero);
      }
    }
  return true;
}

constexpr Way kPlain = {pack_plain, run_plain};

void destroy(void* kernel) {
  auto* self = static_cast<Convolution*>(kernel);
  std::free(self->scales);
  std::free(self->biases);
  std::free(self->weights);
  std::free(self->padding);
  std::free(self);
}

Status fill(Convolution& self, const void* info, Way fast, bool depthwise) {
  View x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias;
  View* constants[] = {&x_scale, &x_zero, &w, &w_scale, &w_zero, &y_scale, &y_zero, &bias};
  for (size_t index = 0; index < 8; index++)
    if (Status wrong = constant_input(info, index + 1, *constants[index])) return wrong;
  struct { const char* name; int64_t* place; size_t count; } rows[] = {
      {"kernel_shape", self.kernel, 2}, {"strides", self.strides, 2}, {"pads", self.pads, 4}};
  for (auto& row : rows) {
    size_t count = row.count;
    if (Status wrong = call(kIntegers, info, row.name, row.place, &count)) return wrong;
    if (count != row.count) return wrong_argument("edgeq.kernels: a convolution's window has two axes");
  }
  self.depthwise = depthwise;
  self.channels = size_t(w.shape[0]);
  self.inputs = depthwise ? self.channels : size_t(w.shape[1]);
  self.taps = size_t(self.kernel[0] * self.kernel[1]);
  self.depth = self.taps * (depthwise ? 1 : self.inputs);
  if (self.channels < kFewestChannels || self.taps > kMostTaps || w.count != self.channels * self.depth ||
      bias.count != self.channels || (w_scale.count != 1 && w_scale.count != self.channels))
    return wrong_argument("edgeq.kernels: weights [channels >= 16, of a group, kernel] and a bias a channel are needed");
  for (size_t index = 0; index < w_zero.count; index++)
    if (w_zero.as<int8_t>()[index]) return wrong_argument("edgeq.kernels: weights have no zero point");
  self.x_zero = *x_zero.as<uint8_t>();
  self.y_zero = *y_zero.as<uint8_t>();
  self.scales = static_cast<float*>(std::malloc(self.channels * sizeof(float)));
  self.biases = static_cast<int32_t*>(std::malloc(self.channels * sizeof(int32_t)));
  self.padding = static_cast<uint8_t*>(std::malloc(self.inputs));
  if (!self.scales || !self.biases || !self.padding) return wrong_argument("edgeq.kernels: no memory");
  std::memset(self.padding, self.x_zero, self.inputs);
  self.way = fast.run ? fast : kPlain;
  for (size_t channel = 0; channel < self.channels; channel++) {
    const float scale = w_scale.as<float>()[w_scale.count == 1 ? 0 : channel];
    self.scales[channel] = *x_scale.as<float>() * scale / *y_scale.as<float>();
    int32_t sum = 0;
    for (size_t tap = 0; tap < self.depth; tap++) sum += w.as<int8_t>()[channel * self.depth + tap];
    self.biases[channel] = bias.as<int32_t>()[channel] - self.x_zero * sum;
    const float most = (float(self.depth) * 255 * 128 + std::fabs(float(self.biases[channel]))) * self.scales[channel];
    if (!(most < float(1 << 30))) self.way = kPlain;
  }
  return self.way.pack(self, w.as<int8_t>()) ? nullptr : wrong_argument("edgeq.kernels: no memory");
}

struct Work {
  const Convolution* self;
  const uint8_t* x;
  uint8_t* y;
  int64_t height, width, out_height, out_width, rows, tasks;  // rows of a task; tasks of a picture
  bool failed;
};

void task(void* given, size_t index) {
  auto& work = *static_cast<Work*>(given);
  const Convolution& self = *work.self;
  const int64_t picture = int64_t(index) / work.tasks, first = int64_t(index) % work.tasks * work.rows;
  const int64_t end = first + work.rows < work.out_height ? first + work.rows : work.out_height;
  const uint8_t* x = work.x + picture * work.height * work.width * int64_t(self.inputs);
  uint8_t* y = work.y + (picture * work.out_height + first) * work.out_width * int64_t(self.channels);
  if (!self.way.run(self, {x, y, work.height, work.width, work.out_width, first, end})) work.failed = true;
}

Status compute(void* kernel, void* context) {
  const auto& self = *static_cast<const Convolution*>(kernel);
  View x;
  void* y = nullptr;
  if (Status wrong = input(context, 0, x)) return wrong;
  if (x.rank != 4 || size_t(x.shape[3]) != self.inputs)
    return wrong_argument("edgeq.kernels: X must be [batch, height, width, channels of the weights]");
  int64_t shape[4] = {x.shape[0], 0, 0, int64_t(self.channels)};
  for (int axis = 0; axis < 2; axis++) {
    const int64_t room = x.shape[1 + axis] + self.pads[axis] + self.pads[2 + axis] - self.kernel[axis];
    if (room < 0) return wrong_argument("edgeq.kernels: X is smaller than the convolution's window");
    shape[1 + axis] = room / self.strides[axis] + 1;
  }
  if (Status wrong = output(context, shape, 4, &y)) return wrong;
  const int64_t of_a_row = shape[2] * int64_t(self.channels * self.depth);
  const int64_t wanted = (int64_t(kTaskTaps) + of_a_row - 1) / of_a_row;
  const int64_t rows = wanted < shape[1] ? wanted : shape[1];
  Work work{&self,    x.as<uint8_t>(), static_cast<uint8_t*>(y), x.shape[1], x.shape[2], shape[1], shape[2], rows,
            (shape[1] + rows - 1) / rows, false};
  const size_t tasks = size_t(shape[0] * work.tasks);
  Status wrong = nullptr;
  if (tasks > 1)
    wrong = parallel(context, task, tasks, &work);
  else if (tasks == 1)
    task(&work, 0);
  return wrong ? wrong : work.failed ? wrong_argument("edgeq.kernels: no memory") : nullptr;
}

constexpr int kTypes[] = {kUint8, kFloat, kUint8, kInt8, kFloat, kInt8, kFloat, kUint8, kInt32};

}  // namespace

void under(const Convolution& self, const Picture& picture, int64_t row, int64_t column, const uint8_t** found) {
  for (int64_t ky = 0; ky < self.kernel[0]; ky++)
    for (int64_t kx = 0; kx < self.kernel[1]; kx++) {
      const int64_t y = row * self.strides[0] - self.pads[0] + ky, x = column * self.strides[1] - self.pads[1] + kx;
      const bool inside = y >= 0 && y < picture.height && x >= 0 && x < picture.width;
      *found++ = inside ? picture.x + (y * picture.width + x) * int64_t(self.inputs) : self.padding;
    }
}

Status create_convolution(const void* info, Way fast, bool depthwise, void** kernel) {
  auto* self = static_cast<Convolution*>(std::calloc(1, sizeof(Convolution)));
  if (!self) return wrong_argument("edgeq.kernels: no memory");
  Status wrong = fill(*self, info, fast, depthwise);
  if (wrong)
    destroy(self);
  else
    *kernel = self;
  return wrong;
}

CustomOp convolution_op(const char* called, Status (*create)(const CustomOp*, Api, const void*, void**)) {
  CustomOp op(called, kTypes, 9, kUint8);
  op.create = create;
  op.compute = compute;
  op.destroy = destroy;
  return op;
}

}  // namespace edgeq
