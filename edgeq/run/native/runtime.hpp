// ONNX Runtime through its C interface, loaded when the program starts: a table of functions that only ever grows, so a
// place in it (checked against the header of 1.32) holds for every later version, and no header or import library is
// needed.
#pragma once
#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor.hpp"

namespace edgeq {

struct Runtime {
  enum Slot {
    kGetErrorMessage = 2, kCreateEnv = 3, kCreateSession = 7, kRun = 9, kCreateSessionOptions = 10,
    kSetOptimizedModelPath = 11, kSetIntraOpNumThreads = 24, kGetInputCount = 30, kGetOutputCount = 31,
    kGetInputName = 36, kGetOutputName = 37, kCreateTensorWithData = 49, kGetTensorData = 51, kGetElementType = 60,
    kGetDimensionsCount = 61, kGetDimensions = 62, kGetTypeAndShape = 65, kCreateCpuMemoryInfo = 69,
    kFreeByAllocator = 76, kGetDefaultAllocator = 78, kReleaseEnv = 92, kReleaseStatus = 93, kReleaseMemoryInfo = 94,
    kReleaseSession = 95, kReleaseValue = 96, kReleaseTypeAndShape = 99, kReleaseSessionOptions = 100,
    kCreateEnvWithPool = 119, kUsePoolOfEnv = 120, kCreatePoolOptions = 121, kReleasePoolOptions = 122,
    kAddSessionConfigEntry = 130, kSetPoolThreads = 147, kRegisterCustomOps = 228,
  };
  static constexpr uint32_t kVersion = 14;  // of the table; the first that has kRegisterCustomOps
  static constexpr int kWarning = 2, kError = 3, kArena = 1, kDefaultMemory = 0;

  struct Base {
    void* const* (*table)(uint32_t version);
    const char* (*version)();
  };

  // `open` makes the environment; without it sessions have pools of their own.
  explicit Runtime(const std::function<void(Runtime&)>& open = {}) {
    const char* given = std::getenv("EDGEQ_ONNXRUNTIME");
#if defined(_WIN32)
    std::string name = given ? given : "onnxruntime.dll";
    HMODULE library = LoadLibraryA(name.c_str());
    auto base = library ? reinterpret_cast<Base* (*)()>(GetProcAddress(library, "OrtGetApiBase")) : nullptr;
    std::string why = "error " + std::to_string(GetLastError());
#else
#if defined(__APPLE__)
    std::string name = given ? given : "libonnxruntime.dylib";
#else
    std::string name = given ? given : "libonnxruntime.so.1";
#endif
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    auto base = library ? reinterpret_cast<Base* (*)()>(dlsym(library, "OrtGetApiBase")) : nullptr;
    const char* told = base ? nullptr : dlerror();
    std::string why = told ? told : "it has no OrtGetApiBase";
#endif
    if (!base) throw std::runtime_error("can't load ONNX Runtime: " + why + "; set EDGEQ_ONNXRUNTIME to its library");
    version = base()->version();
    table = base()->table(kVersion);
    if (!table) throw std::runtime_error("ONNX Runtime " + version + " is too old");
    if (open)
      open(*this);
    else
      check(call<void*>(kCreateEnv, kError, "edgeq", &env));
    check(call<void*>(kCreateCpuMemoryInfo, kArena, kDefaultMemory, &memory));
  }
  ~Runtime() {
    if (memory) call<void>(kReleaseMemoryInfo, memory);
    if (env) call<void>(kReleaseEnv, env);
  }
  Runtime(const Runtime&) = delete;

  template <class Result, class... Arguments>
  Result call(Slot slot, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table[slot])(arguments...);
  }

  void check(void* status) const {
    if (!status) return;
    std::string message = call<const char*>(kGetErrorMessage, status);
    call<void>(kReleaseStatus, status);
    throw std::runtime_error(message);
  }

  std::string version;
  void* const* table = nullptr;
  void* env = nullptr;
  void* memory = nullptr;
};

class Session {
 public:
  // `more` sets what else the options (OrtSessionOptions*) shall hold.
  Session(std::shared_ptr<const Runtime> runtime, const std::filesystem::path& model, int threads,
          const std::vector<std::pair<std::string, std::string>>& config,
          const std::function<void(void* options)>& more = {});
  ~Session();
  Session(const Session&) = delete;

  std::map<std::string, Tensor> run(const std::map<std::string, Tensor>& inputs,
                                    const std::vector<const char*>& outputs) const;
  // The same for a clock: what it computes is thrown away.
  void lap(const std::map<std::string, Tensor>& inputs, const std::vector<const char*>& outputs) const;

  // Let sessions with these options use a library of custom operators, which is loaded.
  static void add_kernels(const Runtime& runtime, void* options, const std::filesystem::path& library);

 protected:
  std::shared_ptr<const Runtime> runtime_;
  void* session_ = nullptr;
};

}  // namespace edgeq
