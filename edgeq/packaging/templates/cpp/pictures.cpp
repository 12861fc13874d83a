// Pictures as model inputs, to the bit what edgeq's own loader makes: weights in whole numbers of 2**-22, each pass
// rounded to the nearest level, the width brought to size first.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "contents.hpp"
#include "edgeq.hpp"

namespace edgeq {
namespace {

constexpr int kPrecision = 22;
constexpr double kPi = 3.14159265358979323846;

struct Image {
  int height, width, channels;
  std::vector<uint8_t> pixels;
};

struct Taps {
  int first;
  std::vector<int32_t> weights;
};

double sinc(double x) { return x == 0 ? 1 : std::sin(kPi * x) / (kPi * x); }

double support(const std::string& name) {
  return name == "box" ? 0.5 : name == "bicubic" ? 2 : name == "lanczos" ? 3 : 1;
}

double weight(const std::string& name, double at) {
  double x = std::abs(at);
  if (name == "box") return at > -0.5 && at <= 0.5 ? 1 : 0;
  if (name == "bilinear") return std::max(1 - x, 0.0);
  if (name == "hamming") return x < 1 ? sinc(at) * (0.54 + 0.46 * std::cos(kPi * at)) : 0;
  if (name == "lanczos") return x < 3 ? sinc(at) * sinc(at / 3) : 0;
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

Taps taps(int index, int found, int size, const std::string& name) {
  double ratio = double(found) / size;
  if (name == "nearest") return {std::min(int((index + 0.5) * ratio), found - 1), {1 << kPrecision}};
  double stretch = std::max(ratio, 1.0), centre = (index + 0.5) * ratio, reach = support(name) * stretch;
  int first = std::max(int(centre - reach + 0.5), 0), last = std::min(int(centre + reach + 0.5), found);
  std::vector<double> parts;
  for (int at = first; at < last; at++) parts.push_back(weight(name, (at - centre + 0.5) / stretch));
  double sum = std::accumulate(parts.begin(), parts.end(), 0.0);
  Taps made{first, {}};
  for (double part : parts) {
    double whole = part / sum * (1 << kPrecision);
    made.weights.push_back(int32_t(std::trunc(whole + std::copysign(0.5, whole))));
  }
  return made;
}

Image resampled(const Image& image, int size, bool wide, const std::string& name) {
  int found = wide ? image.width : image.height;
  if (found == size) return image;
  Image made{wide ? image.height : size, wide ? size : image.width, image.channels, {}};
  made.pixels.resize(size_t(made.height) * made.width * made.channels);
  size_t step = wide ? image.channels : size_t(image.width) * image.channels, out = 0;
  std::vector<Taps> all;
  for (int index = 0; index < size; index++) all.push_back(taps(index, found, size, name));
  for (int y = 0; y < made.height; y++)
    for (int x = 0; x < made.width; x++) {
      const Taps& line = all[wide ? x : y];
      size_t begin = (wide ? size_t(y) * image.width : size_t(x)) * image.channels + line.first * step;
      for (int c = 0; c < made.channels; c++) {
        int32_t sum = 1 << (kPrecision - 1);
        for (size_t tap = 0; tap < line.weights.size(); tap++)
          sum += line.weights[tap] * image.pixels[begin + tap * step + c];
        made.pixels[out++] = uint8_t(std::clamp(sum >> kPrecision, 0, 255));
      }
    }
  return made;
}

Image cropped(const Image& image, int height, int width) {
  int top = int(std::nearbyint((image.height - height) / 2.0));  // halves to even, the default of every platform
  int left = int(std::nearbyint((image.width - width) / 2.0));
  Image made{height, width, image.channels, std::vector<uint8_t>(size_t(height) * width * image.channels)};
  for (int y = std::max(-top, 0); y < std::min(height, image.height - top); y++)
    for (int x = std::max(-left, 0); x < std::min(width, image.width - left); x++)
      for (int c = 0; c < image.channels; c++)
        made.pixels[(size_t(y) * width + x) * image.channels + c] =
            image.pixels[(size_t(y + top) * image.width + x + left) * image.channels + c];
  return made;
}

Image grey(const Picture& picture) {
  Image made{picture.height, picture.width, 1, {}};
  for (size_t i = 0; i < picture.pixels.size(); i += 3) {
    const uint8_t* rgb = &picture.pixels[i];
    made.pixels.push_back(uint8_t((rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16));
  }
  return made;
}

Tensor scaled(const Image& image) {
  const contents::Preprocessing& how = contents::preprocessing();
  bool planes = std::string(how.layout) == "NCHW", turned = std::string(how.channels) == "BGR";
  size_t count = size_t(image.height) * image.width;
  std::vector<float> values(count * image.channels);
  for (size_t i = 0; i < count; i++)
    for (int c = 0; c < image.channels; c++) {
      float value = image.pixels[i * image.channels + (turned ? image.channels - 1 - c : c)] * how.scale;
      value = (value - how.mean[how.mean.size() > 1 ? c : 0]) / how.std[how.std.size() > 1 ? c : 0];
      values[planes ? c * count + i : i * image.channels + c] = value;
    }
  Tensor made{how.type, {1, image.height, image.width, image.channels}, {}};
  if (planes) made.shape = {1, image.channels, image.height, image.width};
  if (made.type == "uint8") {  // the model does the arithmetic
    for (float value : values) made.bytes.push_back(uint8_t(value));
    return made;
  }
  made.bytes.resize(values.size() * 4);
  std::memcpy(made.bytes.data(), values.data(), made.bytes.size());
  return made;
}

}  // namespace

Tensor preprocess(const Picture& picture) {
  const contents::Preprocessing& how = contents::preprocessing();
  Image image = std::string(how.channels) == "L" ? grey(picture)
                                                 : Image{picture.height, picture.width, 3, picture.pixels};
  if (!how.resize.empty()) {
    int height = how.resize[0], width = how.resize.back();
    if (how.resize.size() == 1) {  // the shorter side; the longer one is truncated
      double side = how.resize[0];
      int shorter = std::min(image.height, image.width);
      height = int(side * image.height / shorter), width = int(side * image.width / shorter);
    }
    image = resampled(resampled(image, width, true, how.interpolation), height, false, how.interpolation);
  }
  if (!how.crop.empty()) image = cropped(image, how.crop[0], how.crop[1]);
  return scaled(image);
}

}  // namespace edgeq
