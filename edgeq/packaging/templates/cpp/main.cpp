// @NAME@-run PACKAGE [PICTURE.ppm …]: checks the package; tells what is in each picture (binary PPM, as `convert` writes it).
#include <exception>
#include <fstream>
#include <iostream>

#include "edgeq.hpp"

static edgeq::Picture read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  edgeq::Picture picture;
  int levels = 0;
  file >> kind >> picture.width >> picture.height >> levels;
  file.get();
  if (!file || kind != "P6" || levels != 255) throw std::runtime_error(std::string(path) + " is no binary PPM of 8 bits");
  picture.pixels.resize(size_t(picture.height) * picture.width * 3);
  file.read(reinterpret_cast<char*>(picture.pixels.data()), std::streamsize(picture.pixels.size()));
  if (!file) throw std::runtime_error(std::string(path) + " is cut off");
  return picture;
}

int main(int count, char** words) try {
  if (count < 2) throw std::runtime_error("usage: @NAME@-run PACKAGE [PICTURE.ppm …]");
  edgeq::Model model(words[1]);
  std::cout << "running '" << model.variant() << "'\n";
  for (int i = 2; i < count; i++)
    for (const edgeq::Answer& row : model.answer(read_ppm(words[i])))
      std::cout << words[i] << '\t' << row.label << '\t' << row.score << '\n';
} catch (const std::exception& fault) {
  std::cerr << "refused: " << fault.what() << '\n';
  return 1;
}
