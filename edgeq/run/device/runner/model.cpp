#include "model.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace edgeq {
namespace {

// numpy's names on the wire, the runtime's here.
constexpr const char* kTypes[][2] = {
    {"<f4", "float32"}, {"|u1", "uint8"}, {"|i1", "int8"},    {"<u2", "uint16"},  {"<i2", "int16"},  {"<i4", "int32"},
    {"<i8", "int64"},   {"|b1", "bool"},  {"<f2", "float16"}, {"<f8", "float64"}, {"<u4", "uint32"}, {"<u8", "uint64"},
};

std::string translated(const std::string& name, int from) {
  for (auto& row : kTypes)
    if (name == row[from]) return row[1 - from];
  throw Failure("run", "edgeq-run passes no tensors of type " + name);
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// A file in memory as long as this lives; its pages needn't stay there.
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY);
    struct stat found {};
    if (file < 0 || fstat(file, &found)) throw Failure("altered", path + " isn't there");
    size = size_t(found.st_size);
    if (size) data_ = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (data_ == MAP_FAILED) throw std::runtime_error(path + " can't be read");
  }
  ~Mapped() {
    if (size) munmap(data_, size);
  }
  Mapped(const Mapped&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  size_t size = 0;

 private:
  void* data_ = nullptr;
};

std::vector<std::pair<std::string, std::string>> config(const Json& model) {
  if (model["provider"].text != kProvider)
    throw Failure("runtime", "edgeq-run has no " + model["provider"].text + ", only " + kProvider);
  std::vector<std::pair<std::string, std::string>> entries;
  for (auto& [key, value] : model["session"].members) entries.emplace_back(key, value.text);
  return entries;
}

std::vector<const char*> pointers(const Names& names) {
  std::vector<const char*> made;
  for (auto& one : names) made.push_back(one.c_str());
  return made;
}

// What `action` returns; what the runtime calls an error is a Failure.
template <class Action>
auto told(const std::string& kind, const std::string& words, Action action) -> decltype(action()) try {
  return action();
} catch (const Failure&) {
  throw;
} catch (const std::runtime_error& fault) {
  throw Failure(kind, words + ": " + first_line(fault.what()));
}

}  // namespace

std::string dtype_of(const Tensor& tensor) { return translated(tensor.type, 1); }

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::string digest(const std::string& path) {
  Mapped file(path);
  return sha256(file.data(), file.size);
}

std::vector<Feed> feeds_of(const Json& packed) {
  Mapped file(packed["file"].text);
  std::vector<Feed> feeds;
  for (auto& row : packed["index"].items) {
    feeds.emplace_back();
    for (auto& one : row.items) {
      Tensor tensor{translated(one["dtype"].text, 0), {}, {}};
      size_t bytes = size_t(one["dtype"].text.back() - '0');
      for (auto& side : one["shape"].items) {
        tensor.shape.push_back(int64_t(side.number()));
        bytes *= size_t(side.number());
      }
      const uint8_t* begin = file.data() + size_t(one["offset"].number());
      tensor.bytes.assign(begin, begin + bytes);
      feeds.back()[one["name"].text] = std::move(tensor);
    }
  }
  return feeds;
}

std::shared_ptr<const Runtime> runtime(const std::function<void(Runtime&)>& open) try {
  return std::make_shared<const Runtime>(open);
} catch (const std::runtime_error& fault) {
  throw Failure("runtime", fault.what());
}

Model::Model(const std::shared_ptr<const Runtime>& runtime, const Json& model, int threads,
             const std::function<void(void*)>& more)
    try : Session(runtime, model["file"].text, threads, config(model),
                  [&](void* options) {
                    if (const std::string& library = model["kernels"].text; !library.empty())
                      add_kernels(*runtime, options, std::filesystem::absolute(library));
                    if (more) more(options);
                  }),
          name(model["name"].text) {
  inputs = names(Runtime::kGetInputCount, Runtime::kGetInputName);
  outputs = names(Runtime::kGetOutputCount, Runtime::kGetOutputName);
} catch (const Failure&) {
  throw;
} catch (const std::runtime_error& fault) {
  throw Failure("model", model["name"].text + " can't be loaded: " + first_line(fault.what()));
}

Feed Model::taken(const Feed& feed) const {
  Feed own;
  for (auto& input : inputs) {
    auto found = feed.find(input);
    if (found == feed.end()) throw Failure("run", name + " takes " + input + ", which no sample holds");
    own.insert(*found);
  }
  return own;
}

Feed Model::computed(const Feed& feed, const Names& wanted) const {
  return told("run", name + " fails while running", [&] { return run(feed, pointers(wanted)); });
}

double Model::lap_ms(const Feed& feed) const {
  std::vector<const char*> wanted = pointers(outputs);
  return told("run", name + " fails while running", [&] {
    auto start = Clock::now();
    lap(feed, wanted);
    return milliseconds_since(start);
  });
}

Names Model::names(Runtime::Slot count, Runtime::Slot name_at) const {
  size_t size = 0;
  void* allocator = nullptr;
  runtime_->check(runtime_->call<void*>(count, session_, &size));
  runtime_->check(runtime_->call<void*>(Runtime::kGetDefaultAllocator, &allocator));
  Names found;
  for (size_t i = 0; i < size; i++) {
    char* text = nullptr;
    runtime_->check(runtime_->call<void*>(name_at, session_, i, allocator, &text));
    found.emplace_back(text);
    runtime_->check(runtime_->call<void*>(Runtime::kFreeByAllocator, allocator, text));
  }
  return found;
}

}  // namespace edgeq
