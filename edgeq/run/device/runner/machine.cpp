// What this machine is.
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <vector>

#include "json.hpp"
#include "runner.hpp"
#include "runtime.hpp"

namespace edgeq {
namespace {

namespace fs = std::filesystem;

// What lies in `place`, in order.
std::vector<fs::path> entries(const fs::path& place) {
  std::error_code unreadable;  // there is none, or it isn't for us
  std::vector<fs::path> found{fs::directory_iterator(place, unreadable), {}};
  std::sort(found.begin(), found.end());
  return found;
}

// Of it what has `stem` and a number for a name.
std::vector<fs::path> numbered(const fs::path& place, const std::string& stem) {
  std::vector<fs::path> found;
  for (auto& path : entries(place)) {
    std::string name = path.filename().string();
    bool digits = name.size() > stem.size() && name.find_first_not_of("0123456789", stem.size()) == std::string::npos;
    if (digits && name.compare(0, stem.size(), stem) == 0) found.push_back(path);
  }
  return found;
}

// Files of a folder, by their names.
std::string texts(const fs::path& place, const std::vector<const char*>& names) {
  std::vector<Member> rows;
  for (const char* name : names) rows.emplace_back(name, in_quotes(text_of(place / name)));
  return object(rows);
}

// The first core's flags, sorted.
std::set<std::string> isa() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.compare(0, 5, "flags") == 0 || line.compare(0, 8, "Features") == 0) {
      std::istringstream words(line.substr(line.find(':') + 1));
      return {std::istream_iterator<std::string>(words), {}};
    }
  return {};
}

// What interprets this machine's instructions, "" where silicon does: QEMU shows a program its own name, but not that
// of its parent.
std::string emulator() {
  std::error_code unreadable;
  std::string name = fs::read_symlink("/proc/" + std::to_string(getppid()) + "/exe", unreadable).filename().string();
  if (name.compare(0, 5, "qemu-") == 0) return name;
  return text_of("/proc/cmdline").find("ranchu") == std::string::npos ? "" : "Android emulator";
}

}  // namespace

std::string text_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  const std::string blank(" \t\r\n\0", 5);
  size_t first = text.find_first_not_of(blank), last = text.find_last_not_of(blank);
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

long long kilobytes(const char* file, const std::string& key) {
  std::ifstream rows(file);
  for (std::string line; std::getline(rows, line);)
    if (line.compare(0, key.size(), key) == 0) return std::atoll(line.c_str() + key.size());
  return 0;
}

std::string state() {
  std::set<std::string> governors;
  std::vector<std::string> clocks;
  std::vector<Member> heats;
  for (auto& core : numbered("/sys/devices/system/cpu", "cpu")) {
    std::string governor = text_of(core / "cpufreq/scaling_governor");
    std::string clock = text_of(core / "cpufreq/scaling_cur_freq");
    if (!governor.empty()) governors.insert(governor);
    if (!clock.empty()) clocks.push_back(number(std::atof(clock.c_str()) / 1000));
  }
  for (auto& zone : numbered("/sys/class/thermal", "thermal_zone")) {
    std::string kind = text_of(zone / "type"), heat = text_of(zone / "temp");
    if (heat.empty()) continue;
    heats.emplace_back(kind.empty() ? zone.filename().string() : kind, number(std::atof(heat.c_str()) / 1000));
  }
  std::string governor;
  for (auto& one : governors) governor += (governor.empty() ? "" : ", ") + one;
  return object({{"governor", in_quotes(governor)}, {"mhz", list(clocks)}, {"celsius", object(heats)}});
}

std::string power() {
  std::vector<std::string> zones, batteries;
  for (auto& zone : numbered("/sys/class/powercap", "intel-rapl:"))
    zones.push_back(texts(zone, {"name", "energy_uj", "max_energy_range_uj"}));
  for (auto& one : entries("/sys/class/power_supply"))
    if (text_of(one / "type") == "Battery")
      batteries.push_back(
          texts(one, {"status", "energy_now", "charge_now", "voltage_now", "current_now", "power_now"}));
  return object({{"rapl", list(zones)}, {"batteries", list(batteries)}});
}

std::string facts() {
  utsname kernel{};
  uname(&kernel);
  struct statvfs disk {};
  statvfs(".", &disk);
  std::string found = object({
      {"machine", in_quotes(kernel.machine)},
      {"system", in_quotes(std::string(kernel.sysname) + " " + kernel.release)},
      {"board", in_quotes(text_of("/sys/firmware/devicetree/base/model"))},
      {"isa", list_of(isa(), in_quotes)},
      {"cores", std::to_string(sysconf(_SC_NPROCESSORS_ONLN))},
      {"memory_bytes", std::to_string(kilobytes("/proc/meminfo", "MemTotal:") * 1024)},
      {"free_bytes", std::to_string(uint64_t(disk.f_bavail) * disk.f_frsize)},
      {"runtime", in_quotes(Runtime().version)},
      {"emulator", in_quotes(emulator())},
  });
  return found.substr(0, found.size() - 1) + ", " + state().substr(1);
}

}  // namespace edgeq
