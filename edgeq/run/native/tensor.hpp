// An array as it goes into a model and comes out of it, and digests of bytes.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace edgeq {

struct Tensor {
  std::string type;  // "float32", "int64", … as in the manifest
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

std::string sha256(const uint8_t* data, size_t size);

}  // namespace edgeq
