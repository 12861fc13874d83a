#include "runtime.hpp"

#include <algorithm>
#include <cstring>

namespace edgeq {
namespace {

struct Type {
  const char* name;
  int number;  // ONNXTensorElementDataType
  size_t bytes;
};

constexpr Type kTypes[] = {
    {"float32", 1, 4}, {"uint8", 2, 1},    {"int8", 3, 1},    {"uint16", 4, 2},  {"int16", 5, 2},   {"int32", 6, 4},
    {"int64", 7, 8},   {"bool", 9, 1},     {"float16", 10, 2}, {"float64", 11, 8}, {"uint32", 12, 4}, {"uint64", 13, 8},
};

template <class Match>
const Type& type_where(Match match, const std::string& what) {
  auto found = std::find_if(std::begin(kTypes), std::end(kTypes), match);
  if (found == std::end(kTypes)) throw std::runtime_error("tensors of type " + what + " can't be passed");
  return *found;
}

// Values that are released whatever happens.
struct Values {
  explicit Values(const Runtime& of, size_t count = 0) : runtime(of), all(count) {}
  Values(Values&&) = default;
  const Runtime& runtime;
  std::vector<void*> all;
  ~Values() {
    for (void* value : all)
      if (value) runtime.call<void>(Runtime::kReleaseValue, value);
  }
};

Tensor copied(const Runtime& runtime, void* value) {
  void* info = nullptr;
  runtime.check(runtime.call<void*>(Runtime::kGetTypeAndShape, value, &info));
  std::shared_ptr<void> held(info, [&](void* one) { runtime.call<void>(Runtime::kReleaseTypeAndShape, one); });
  int number = 0;
  size_t rank = 0;
  runtime.check(runtime.call<void*>(Runtime::kGetElementType, info, &number));
  runtime.check(runtime.call<void*>(Runtime::kGetDimensionsCount, info, &rank));
  const Type& type = type_where([&](const Type& row) { return row.number == number; }, std::to_string(number));
  Tensor made{type.name, std::vector<int64_t>(rank), {}};
  runtime.check(runtime.call<void*>(Runtime::kGetDimensions, info, made.shape.data(), rank));
  size_t bytes = type.bytes;
  for (int64_t side : made.shape) bytes *= size_t(side);
  void* data = nullptr;
  runtime.check(runtime.call<void*>(Runtime::kGetTensorData, value, &data));
  auto begin = static_cast<const uint8_t*>(data);
  made.bytes.assign(begin, begin + bytes);
  return made;
}

}  // namespace

Session::Session(std::shared_ptr<const Runtime> runtime, const std::filesystem::path& model, int threads,
                 const std::vector<std::pair<std::string, std::string>>& config,
                 const std::function<void(void* options)>& more)
    : runtime_(std::move(runtime)) {
  void* options = nullptr;
  runtime_->check(runtime_->call<void*>(Runtime::kCreateSessionOptions, &options));
  std::shared_ptr<void> held(options, [&](void* one) { runtime_->call<void>(Runtime::kReleaseSessionOptions, one); });
  runtime_->check(runtime_->call<void*>(Runtime::kSetIntraOpNumThreads, options, threads));
  for (auto& [key, value] : config)
    runtime_->check(runtime_->call<void*>(Runtime::kAddSessionConfigEntry, options, key.c_str(), value.c_str()));
  if (more) more(options);
  runtime_->check(runtime_->call<void*>(Runtime::kCreateSession, runtime_->env, model.c_str(), options, &session_));
}

void Session::add_kernels(const Runtime& runtime, void* options, const std::filesystem::path& library) {
  runtime.check(runtime.call<void*>(Runtime::kRegisterCustomOps, options, library.c_str()));
}

Session::~Session() { runtime_->call<void>(Runtime::kReleaseSession, session_); }

namespace {

Values computed(const Runtime& runtime, void* session, const std::map<std::string, Tensor>& inputs,
                const std::vector<const char*>& outputs) {
  Values given(runtime), made(runtime, outputs.size());
  std::vector<const char*> names;
  for (auto& [name, tensor] : inputs) {
    const std::string& word = tensor.type;
    const Type& type = type_where([&](const Type& row) { return row.name == word; }, word);
    void* value = nullptr;
    auto data = static_cast<void*>(const_cast<uint8_t*>(tensor.bytes.data()));
    runtime.check(runtime.call<void*>(Runtime::kCreateTensorWithData, runtime.memory, data, tensor.bytes.size(),
                                      tensor.shape.data(), tensor.shape.size(), type.number, &value));
    names.push_back(name.c_str());
    given.all.push_back(value);
  }
  void* no_options = nullptr;
  runtime.check(runtime.call<void*>(Runtime::kRun, session, no_options, names.data(), given.all.data(), names.size(),
                                    outputs.data(), outputs.size(), made.all.data()));
  return made;
}

}  // namespace

std::map<std::string, Tensor> Session::run(const std::map<std::string, Tensor>& inputs,
                                           const std::vector<const char*>& outputs) const {
  Values made = computed(*runtime_, session_, inputs, outputs);
  std::map<std::string, Tensor> found;
  for (size_t i = 0; i < outputs.size(); i++) found[outputs[i]] = copied(*runtime_, made.all[i]);
  return found;
}

void Session::lap(const std::map<std::string, Tensor>& inputs, const std::vector<const char*>& outputs) const {
  computed(*runtime_, session_, inputs, outputs);
}

}  // namespace edgeq
