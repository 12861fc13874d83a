// Models and arrays of jobs, as the host names them.
#pragma once
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.hpp"
#include "runner.hpp"
#include "runtime.hpp"

namespace edgeq {

using Clock = std::chrono::steady_clock;
using Feed = std::map<std::string, Tensor>;
using Names = std::vector<std::string>;

constexpr const char* kProvider = "CPUExecutionProvider";

std::string dtype_of(const Tensor& tensor);  // numpy's name of its type
std::string digest(const std::string& path);
std::vector<Feed> feeds_of(const Json& packed);  // what the host packed: arrays by name, a sample
double milliseconds_since(Clock::time_point start);
std::shared_ptr<const Runtime> runtime(const std::function<void(Runtime&)>& open = {});  // or a Failure

// A model of a job, open. What goes wrong is a Failure.
class Model : public Session {
 public:
  // `more`: as of Session.
  Model(const std::shared_ptr<const Runtime>& runtime, const Json& model, int threads,
        const std::function<void(void*)>& more = {});

  Feed taken(const Feed& feed) const;  // what of it this file takes: an input the others still have may be pinned in it
  Feed computed(const Feed& feed, const Names& wanted) const;
  double lap_ms(const Feed& feed) const;

  std::string name;
  Names inputs, outputs;

 private:
  Names names(Runtime::Slot count, Runtime::Slot name) const;
};

}  // namespace edgeq
