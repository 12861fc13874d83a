// edgeq-run facts | edgeq-run keep FOLDER SECONDS: does on a device without Python what agent.py does on others.
//
// It works in the folder it lies in, where ONNX Runtime's library lies as libonnxruntime.so. What it can't do: statistics
// of data (`observe`), sessions on another provider than the CPU's, tensors of text or of types the host can't name.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>

#include "runner.hpp"

int main(int count, char** words) try {
  std::filesystem::current_path(std::filesystem::absolute(words[0]).parent_path());
  setenv("EDGEQ_ONNXRUNTIME", "./libonnxruntime.so", 1);
  setenv("ORT_DISABLE_TELEMETRY", "1", 1);  // it would leave files behind, and call home
  if (count == 2 && !std::strcmp(words[1], "facts"))
    std::cout << edgeq::facts() << std::endl;
  else if (count == 4 && !std::strcmp(words[1], "keep"))
    edgeq::keep(words[2], std::atof(words[3]));
  else
    throw std::runtime_error("usage: edgeq-run facts | edgeq-run keep FOLDER SECONDS");
} catch (const std::exception& fault) {
  std::cerr << fault.what() << '\n';
  return 1;
}
