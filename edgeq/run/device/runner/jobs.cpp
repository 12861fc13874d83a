// The tasks of jobs, as agent.py has them, on ONNX Runtime's C interface.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <random>

#include "model.hpp"

namespace edgeq {
namespace {

// As in agent.py.
constexpr int kMinLaps = 2, kMaxLaps = 20, kMinRounds = 3, kMaxRounds = 2000;
constexpr size_t kWindows = 12;
constexpr double kTurnMs = 20;

int threads_of(const Json& job) { return int(job["threads"].number()); }

std::string outputs(const Json& job, const std::string& name) {
  auto loaded = runtime();
  std::string path = name + ".out", graph = name + ".onnx";
  bool keeps = job["graph"].truth();
  Model model(loaded, job["models"].items.at(0), threads_of(job), [&](void* options) {
    if (keeps) loaded->check(loaded->call<void*>(Runtime::kSetOptimizedModelPath, options, graph.c_str()));
  });
  Names wanted = model.outputs;
  if (!job["outputs"].items.empty()) {
    wanted.clear();
    for (auto& one : job["outputs"].items) wanted.push_back(one.text);
  }
  std::ofstream file(path, std::ios::binary);
  size_t offset = 0;
  std::vector<std::string> index;
  for (auto& feed : feeds_of(job["feeds"])) {
    Feed found = model.computed(feed, wanted);
    index.push_back(list_of(wanted, [&](const std::string& key) {
      const Tensor& tensor = found.at(key);
      file.write(reinterpret_cast<const char*>(tensor.bytes.data()), std::streamsize(tensor.bytes.size()));
      std::string shape = list_of(tensor.shape, [](int64_t side) { return std::to_string(side); });
      std::string dtype = in_quotes(dtype_of(tensor)), place = std::to_string(offset);
      std::string row = object({{"name", in_quotes(key)}, {"dtype", dtype}, {"shape", shape}, {"offset", place}});
      offset += tensor.bytes.size();
      return row;
    }));
  }
  file.close();
  if (!file) throw unwritten(path);
  std::vector<Member> files{{path, in_quotes(digest(path))}};
  if (keeps) files.emplace_back(graph, in_quotes(digest(graph)));
  return object({{"index", list(index)}, {"files", object(files)}});
}

// A model and what has been measured of it so far.
struct Contender {
  Contender(const std::shared_ptr<const Runtime>& runtime, const Json& row, const Feed& feed) {
    auto start = Clock::now();
    model = std::make_unique<Model>(runtime, row, 0, [&](void* options) {
      runtime->check(runtime->call<void*>(Runtime::kUsePoolOfEnv, options));
    });
    load_ms = milliseconds_since(start);
    first_ms = lap(feed);
    double warm = std::min(lap(feed), lap(feed));
    laps_per_turn = std::clamp(int(std::lround(kTurnMs / warm)), kMinLaps, kMaxLaps);
  }

  double lap(const Feed& feed) const { return model->lap_ms(model->taken(feed)); }

  void turn(const Feed& feed) {
    lap(feed);  // pays for the caches the others took
    for (int i = 0; i < laps_per_turn; i++) laps.push_back(lap(feed));
  }

  std::string timing() const {
    return object({{"laps_ms", list_of(laps, number)},
                   {"laps_per_turn", std::to_string(laps_per_turn)},
                   {"load_ms", number(load_ms)},
                   {"first_ms", number(first_ms)}});
  }

  std::unique_ptr<Model> model;
  double load_ms, first_ms;
  int laps_per_turn;
  std::vector<double> laps;
};

// Laps of all models, interleaved in random order on one shared thread pool until `seconds` are over.
std::string compare(const Json& job, const std::string&) {
  auto loaded = runtime([&](Runtime& open) {
    void* pool = nullptr;
    open.check(open.call<void*>(Runtime::kCreatePoolOptions, &pool));
    std::shared_ptr<void> held(pool, [&](void* one) { open.call<void>(Runtime::kReleasePoolOptions, one); });
    open.check(open.call<void*>(Runtime::kSetPoolThreads, pool, threads_of(job)));
    open.check(open.call<void*>(Runtime::kCreateEnvWithPool, Runtime::kError, "edgeq", pool, &open.env));
  });
  std::vector<Feed> feeds = feeds_of(job["feeds"]);
  std::vector<Contender> contenders;
  for (auto& row : job["models"].items) contenders.emplace_back(loaded, row, feeds[0]);
  std::mt19937_64 rng(uint64_t(job["seed"].number()));
  std::string before = state();
  auto start = Clock::now();
  std::vector<size_t> order(contenders.size());
  std::iota(order.begin(), order.end(), 0);
  for (int round = 0; round < kMaxRounds; round++) {
    if (round >= kMinRounds && milliseconds_since(start) > 1e3 * job["seconds"].number()) break;
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t one : order) contenders[one].turn(feeds[size_t(round) % feeds.size()]);
  }
  std::vector<Member> timings;
  for (auto& one : contenders) timings.emplace_back(one.model->name, one.timing());
  return object({{"timings", object(timings)}, {"before", before}, {"after", state()}});
}

// Laps of one model back to back for `seconds`, in windows, with the device's state and energy around each.
std::string sustained(const Json& job, const std::string&) {
  Model model(runtime(), job["models"].items.at(0), threads_of(job));
  std::vector<Feed> feeds;
  for (auto& feed : feeds_of(job["feeds"])) feeds.push_back(model.taken(feed));
  model.lap_ms(feeds.at(0));
  double seconds = job["seconds"].number();
  std::vector<std::string> windows;
  size_t count = 0;
  auto start = Clock::now();
  auto passed = [&] { return milliseconds_since(start) / 1e3; };
  auto told = [&](Member laps, double at) {
    std::string row = object({laps, {"at_s", number(at)}, {"power", power()}});
    return row.substr(0, row.size() - 1) + ", " + state().substr(1);
  };
  std::string before = told({"laps_ms", "[]"}, 0);
  while (windows.size() < kWindows && (windows.empty() || passed() < seconds)) {
    double end = seconds * double(windows.size() + 1) / kWindows;
    std::vector<double> laps;
    while (laps.empty() || passed() < end) laps.push_back(model.lap_ms(feeds[count++ % feeds.size()]));
    windows.push_back(told({"laps_ms", list_of(laps, number)}, passed()));
  }
  return object({{"before", before}, {"windows", list(windows)}});
}

// Highest resident bytes; with `reset` those of now, from which the highest counts again where Linux lets it.
long long resident(bool reset = false) {
  if (reset) {
    std::ofstream file("/proc/self/clear_refs");
    file << "5";
    file.close();
    reset = bool(file);
  }
  return kilobytes("/proc/self/status", reset ? "VmRSS:" : "VmHWM:") * 1024;
}

// Load and run twice; the peak is above what this process held before.
std::string memory(const Json& job, const std::string&) {
  Feed feed = feeds_of(job["feeds"]).at(0);
  auto loaded = runtime();
  long long before = resident(true);
  auto start = Clock::now();
  Model model(loaded, job["models"].items.at(0), threads_of(job));
  double load_ms = milliseconds_since(start);
  Feed own = model.taken(feed);
  double first_ms = model.lap_ms(own);
  model.lap_ms(own);  // uses the memory plan the first run made
  long long peak = std::max(resident() - before, 0LL);
  return object({{"peak_bytes", std::to_string(peak)}, {"load_ms", number(load_ms)}, {"first_ms", number(first_ms)}});
}

// Whether the runtime can be loaded, and what sessions can be opened on.
std::string versions(const Json&, const std::string&) {
  return object({{"onnxruntime", in_quotes(runtime()->version)}, {"providers", list({in_quotes(kProvider)})}});
}

const std::map<std::string, std::string (*)(const Json&, const std::string&)> kTasks = {
    {"versions", versions}, {"outputs", outputs}, {"compare", compare}, {"memory", memory},
    {"sustained", sustained}};

}  // namespace

void run(const std::string& name) {
  std::string result;
  try {
    Json job = Json::parse(text_of(name + ".json"));
    for (auto& [path, expected] : job["files"].members)
      if (digest(path) != expected.text) throw Failure("altered", path + " isn't what was sent: its sha256 differs");
    auto task = kTasks.find(job["task"].text);
    if (task == kTasks.end()) throw Failure("python", "edgeq-run doesn't do '" + job["task"].text + "', Python does");
    result = task->second(job, name);
  } catch (const Failure& failure) {
    result = object({{"error", list({in_quotes(failure.kind), in_quotes(failure.what())})}});
  }
  write(name + ".result", result);
}

}  // namespace edgeq
