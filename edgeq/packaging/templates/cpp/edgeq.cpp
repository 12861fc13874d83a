#include "edgeq.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>

#include "contents.hpp"
#include "runtime.hpp"

namespace edgeq {
namespace {

namespace fs = std::filesystem;
using contents::Variant;

constexpr int kRuns = 5;           // of a golden run, to tell which variant is fastest
constexpr double kClearly = 0.95;  // a later variant must beat the preferred one by more than noise

[[noreturn]] void refuse(const std::string& words) { throw std::runtime_error(words); }

std::vector<uint8_t> read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path.string() + " can't be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

void check_files(const fs::path& package) {
  for (const contents::File& file : contents::files()) {
    if (!file.needed && !fs::exists(package / file.name)) continue;  // what is for people may be left out
    std::vector<uint8_t> bytes = read(package / file.name);
    if (sha256(bytes.data(), bytes.size()) != file.sha256)
      refuse((package / file.name).string() + " is altered: its sha256 isn't the one this program was built with");
  }
}

void check_canary() {
  if (!contents::preprocessing().given) return;
  const contents::Canary& canary = contents::canary();
  Picture picture{canary.height, canary.width, std::vector<uint8_t>(size_t(canary.height) * canary.width * 3)};
  for (uint32_t i = 0; i < picture.pixels.size(); i++) picture.pixels[i] = uint8_t(i * 2654435761u >> 24);
  Tensor made = preprocess(picture);
  for (size_t row = 0; row < canary.at.size(); row++) {
    float value = made.bytes[size_t(canary.at[row])];
    if (made.type == "float32") std::memcpy(&value, &made.bytes[size_t(canary.at[row]) * 4], 4);
    if (!(std::abs(value - canary.values[row]) <= canary.tolerance))
      refuse("preprocessing makes " + std::to_string(value) + " of the canary picture, expected " +
             std::to_string(canary.values[row]));
  }
}

void check_machine(const Variant& variant) {
  if (std::string(variant.provider) != "CPUExecutionProvider") refuse("this loader has no " + std::string(variant.provider));
  std::ifstream info("/proc/cpuinfo");  // elsewhere the golden runs alone must tell
  if (!info) return;
  std::set<std::string> flags{std::istream_iterator<std::string>(info), {}};
  for (auto& choice : variant.isa)
    if (std::none_of(choice.begin(), choice.end(), [&](const char* flag) { return flags.count(flag); }))
      refuse("this machine lacks " + std::string(choice.front()));
}

Tensor tensor(const std::vector<uint8_t>& golden, const contents::Reference& reference) {
  if (reference.offset + reference.bytes > golden.size()) refuse("the golden file is too short");
  auto begin = golden.begin() + int64_t(reference.offset);
  return {reference.type, reference.shape, {begin, begin + int64_t(reference.bytes)}};
}

template <class T>
std::vector<double> numbers_of(const Tensor& tensor) {
  std::vector<T> values(tensor.bytes.size() / sizeof(T));
  std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return {values.begin(), values.end()};
}

double half(uint16_t code) {
  int exponent = code >> 10 & 31, fraction = code & 1023;
  double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(fraction, -24)
                                : std::ldexp(1024 + fraction, exponent - 25);
  return code >> 15 ? -size : size;
}

std::vector<double> numbers(const Tensor& tensor) {
  const std::string& type = tensor.type;
  if (type == "float32") return numbers_of<float>(tensor);
  if (type == "float64") return numbers_of<double>(tensor);
  if (type == "int8") return numbers_of<int8_t>(tensor);
  if (type == "uint8" || type == "bool") return numbers_of<uint8_t>(tensor);
  if (type == "int16") return numbers_of<int16_t>(tensor);
  if (type == "uint16") return numbers_of<uint16_t>(tensor);
  if (type == "int32") return numbers_of<int32_t>(tensor);
  if (type == "uint32") return numbers_of<uint32_t>(tensor);
  if (type == "int64") return numbers_of<int64_t>(tensor);
  if (type == "uint64") return numbers_of<uint64_t>(tensor);
  if (type != "float16") refuse("tensors of type " + type + " can't be compared");
  std::vector<double> made;
  for (double code : numbers_of<uint16_t>(tensor)) made.push_back(half(uint16_t(code)));
  return made;
}

bool near(const Tensor& got, const Tensor& want, double tolerance) {
  if (got.shape != want.shape || got.type != want.type) return false;
  std::vector<double> one = numbers(got), other = numbers(want);
  return std::equal(one.begin(), one.end(), other.begin(), other.end(), [&](double a, double b) {
    return std::abs(a - b) <= tolerance || a == b || (std::isnan(a) && std::isnan(b));
  });
}

// Throws unless all golden runs are repeated; the median of some more in ms, 0 when nobody asks for times.
double repeat_golden(const Session& session, const Variant& variant, const std::vector<uint8_t>& golden, bool timed) {
  std::map<std::string, Tensor> first;
  for (size_t index = 0; index < variant.runs.size(); index++) {
    const contents::Run& run = variant.runs[index];
    std::map<std::string, Tensor> inputs;
    for (auto& reference : run.inputs) inputs[reference.name] = tensor(golden, reference);
    std::map<std::string, Tensor> found = session.run(inputs, contents::outputs());
    for (size_t row = 0; row < run.outputs.size(); row++) {
      auto& [name, tolerance] = variant.tolerances[row];
      if (!near(found[name], tensor(golden, run.outputs[row]), tolerance))
        refuse("'" + std::string(name) + "' differs from golden sample " + std::to_string(index) + " by more than " +
               std::to_string(tolerance));
    }
    if (first.empty()) first = inputs;
  }
  if (!timed || first.empty()) return 0;
  std::vector<double> laps;
  for (int lap = 0; lap < kRuns; lap++) {
    auto start = std::chrono::steady_clock::now();
    session.lap(first, contents::outputs());
    laps.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(laps.begin(), laps.end());
  return laps[kRuns / 2];
}

// Where the result of the first start is kept: EDGEQ_STATE, else the user's cache; empty: nowhere.
fs::path memory() {
  const char* names[] = {"EDGEQ_STATE", "XDG_CACHE_HOME", "HOME"};
  for (const char* name : names)
    if (const char* place = std::getenv(name))
      return fs::path(place) / (std::string(name) == "HOME" ? ".cache" : "") / "edgeq-loaded" /
             (std::string(contents::manifest_sha256) + ".cpp");
  return {};
}

#if defined(__linux__) && !defined(__ANDROID__) && defined(__x86_64__)
constexpr const char* kSystem = "linux-x86_64";
#elif defined(__linux__) && !defined(__ANDROID__) && defined(__aarch64__)
constexpr const char* kSystem = "linux-aarch64";
#else
constexpr const char* kSystem = "";
#endif

std::unique_ptr<Session> open(const std::shared_ptr<const Runtime>& runtime, const fs::path& package,
                              const Variant& variant, int threads) {
  return std::make_unique<Session>(runtime, package / variant.model, threads, variant.session, [&](void* options) {
    for (auto& [system, library] : variant.kernels) {
      if (system != std::string(kSystem) || !fs::exists(package / library)) continue;  // an app may leave it out
      try {
        Session::add_kernels(*runtime, options, fs::absolute(package / library));
      } catch (const std::runtime_error& fault) {  // the model's functions run instead, and compute the same
        std::cerr << "edgeq: " << library << " isn't used, which only takes longer: " << fault.what() << '\n';
      }
    }
  });
}

// What must be the same for a remembered result to count.
std::string stamp(const fs::path& package, const Runtime& runtime) {
  std::ostringstream words;
  words << fs::absolute(package).lexically_normal().string() << ' ' << runtime.version;
  for (const contents::File& file : contents::files())
    if (fs::exists(package / file.name))
      words << ' ' << fs::file_size(package / file.name) << ' '
            << fs::last_write_time(package / file.name).time_since_epoch().count();
  return words.str();
}

std::vector<std::string> lines(const fs::path& path) {
  std::ifstream file(path);
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) found.push_back(line);
  return found;
}

}  // namespace

struct Model::Parts {
  std::unique_ptr<Session> session;
  std::string variant;
  std::vector<std::string> passed_over;
  double milliseconds = std::numeric_limits<double>::infinity();

  void choose(const fs::path& package, int threads, const std::shared_ptr<const Runtime>& runtime) {
    check_files(package);
    check_canary();
    std::vector<uint8_t> golden = read(package / contents::golden);
    for (const Variant& one : contents::variants()) {
      try {
        check_machine(one);
        auto opened = open(runtime, package, one, threads);
        double took = repeat_golden(*opened, one, golden, contents::variants().size() > 1);
        if (session && took >= kClearly * milliseconds) continue;
        if (session)
          passed_over.push_back("'" + variant + "' isn't used: " + std::to_string(milliseconds) + " ms a run, '" +
                                one.name + "' " + std::to_string(took));
        session = std::move(opened), variant = one.name, milliseconds = took;
      } catch (const std::runtime_error& fault) {
        passed_over.push_back("'" + std::string(one.name) + "' isn't used: " + fault.what());
      }
    }
    if (session) return;
    std::string all;
    for (auto& words : passed_over) all += "; " + words;
    refuse("no variant runs here" + all);
  }

  bool remembered(const fs::path& package, int threads, const std::shared_ptr<const Runtime>& runtime) {
    std::vector<std::string> known = lines(memory());
    if (known.size() < 2 || known[0] != stamp(package, *runtime)) return false;
    for (const Variant& one : contents::variants())
      if (known[1] == one.name) {
        session = open(runtime, package, one, threads);
        variant = one.name;
        passed_over.assign(known.begin() + 2, known.end());
      }
    return session != nullptr;
  }

  void remember(const fs::path& package, const Runtime& runtime) const {
    fs::path place = memory();
    std::error_code ignored;  // a place that can't be written: all is checked at each start
    fs::create_directories(place.parent_path(), ignored);
    std::ofstream file(place);
    file << stamp(package, runtime) << '\n' << variant << '\n';
    for (std::string words : passed_over) {
      std::replace(words.begin(), words.end(), '\n', ' ');
      file << words << '\n';
    }
  }
};

Model::Model(const fs::path& package, int threads) : parts_(std::make_unique<Parts>()) {
  auto runtime = std::make_shared<const Runtime>();
  if (parts_->remembered(package, threads, runtime)) return;
  parts_->choose(package, threads, runtime);
  for (auto& words : parts_->passed_over) std::cerr << "edgeq: " << words << "; running '" << parts_->variant << "'\n";
  parts_->remember(package, *runtime);
}

Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

std::map<std::string, Tensor> Model::run(const std::map<std::string, Tensor>& inputs) const {
  return parts_->session->run(inputs, contents::outputs());
}

std::vector<Answer> Model::answer(const Picture& picture) const {
  if (!contents::preprocessing().given) refuse("the package holds no preprocessing for pictures: use run()");
  if (!*contents::postprocessing().output) refuse("the package holds no postprocessing: use run()");
  return postprocess(run({{contents::inputs().front(), preprocess(picture)}}).at(contents::postprocessing().output));
}

const std::string& Model::variant() const { return parts_->variant; }
const std::vector<std::string>& Model::passed_over() const { return parts_->passed_over; }

std::vector<Answer> postprocess(const Tensor& scores) {
  const contents::Postprocessing& how = contents::postprocessing();
  std::vector<double> row = numbers(scores);
  row.resize(size_t(scores.shape.back()));
  if (std::string(how.activation) == "softmax") {
    double top = *std::max_element(row.begin(), row.end()), sum = 0;
    for (double& value : row) sum += value = std::exp(value - top);
    for (double& value : row) value /= sum;
  } else if (std::string(how.activation) == "sigmoid") {
    for (double& value : row) value = 1 / (1 + std::exp(-value));
  }
  std::vector<size_t> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return row[a] > row[b]; });
  if (how.top) order.resize(std::min(order.size(), size_t(how.top)));
  std::vector<Answer> answers;
  for (size_t index : order)
    if (row[index] >= how.threshold) {
      bool named = index < contents::labels().size();
      answers.push_back({named ? contents::labels()[index] : std::to_string(index), int64_t(index), row[index]});
    }
  return answers;
}

}  // namespace edgeq
