// What contents.hpp is made of: the package's manifest as tables, so that the program holds every digest itself.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace edgeq::contents {

struct File {
  const char* name;
  const char* sha256;
  bool needed;
};

struct Reference {  // where an array lies in the golden file
  const char* name;
  const char* type;
  std::vector<int64_t> shape;
  uint64_t offset, bytes;
};

struct Run {
  std::vector<Reference> inputs, outputs;
};

struct Variant {
  const char* name;
  const char* model;
  const char* provider;
  std::vector<std::vector<const char*>> isa;  // of each row one is needed
  std::vector<std::pair<std::string, std::string>> session;
  std::vector<std::pair<const char*, const char*>> kernels;  // libraries by the system they are for
  std::vector<Run> runs;
  std::vector<std::pair<const char*, double>> tolerances;
};

struct Preprocessing {  // resize: none, a shorter side, or height and width
  bool given;
  std::vector<int> resize, crop;
  const char* interpolation;
  float scale;
  std::vector<float> mean, std;
  const char* layout;
  const char* channels;
  const char* type;
};

struct Canary {  // what a known picture becomes
  int height, width;
  std::vector<int64_t> at;
  std::vector<double> values;
  double tolerance;
};

struct Postprocessing {
  const char* output;  // empty: none
  const char* activation;
  int64_t top;
  double threshold;
};

}  // namespace edgeq::contents
