// Opens an edgeq package with ONNX Runtime, and refuses it when a byte or a result is wrong.
//
//   edgeq::Model model("package");                       // libonnxruntime.so.1, or what EDGEQ_ONNXRUNTIME names
//   for (const edgeq::Answer& row : model.answer(picture)) std::cout << row.label << ' ' << row.score << '\n';
//
// The first start checks every digest against contents.hpp, repeats the golden runs of each variant that this machine
// can run and takes the fastest. Errors are std::runtime_error with a sentence that says what is wrong.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tensor.hpp"

namespace edgeq {

struct Picture {  // RGB, a byte a channel, rows from the top
  int height = 0, width = 0;
  std::vector<uint8_t> pixels;
};

struct Answer {
  std::string label;
  int64_t index;
  double score;
};

class Model {
 public:
  explicit Model(const std::filesystem::path& package, int threads = 0);
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  std::map<std::string, Tensor> run(const std::map<std::string, Tensor>& inputs) const;
  std::vector<Answer> answer(const Picture& picture) const;  // best first; of a batch the first row
  const std::string& variant() const;                        // the one that runs
  const std::vector<std::string>& passed_over() const;       // why others don't

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

Tensor preprocess(const Picture& picture);
std::vector<Answer> postprocess(const Tensor& scores);

}  // namespace edgeq
