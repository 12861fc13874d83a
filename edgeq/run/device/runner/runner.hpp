// What edgeq-run is made of. It stands where agent.py does on a device with Python, and speaks the same protocol.
#pragma once
#include <filesystem>
#include <stdexcept>
#include <string>

namespace edgeq {

// What a job can end with: a kind the host knows, and a sentence.
struct Failure : std::runtime_error {
  Failure(std::string of, const std::string& message) : std::runtime_error(message), kind(std::move(of)) {}
  std::string kind;
};

// machine.cpp
std::string facts();                                // what this machine is, as JSON
std::string state();                                // governor, clocks, temperatures
std::string power();                                // what the kernel shows of energy, in its own words and units
std::string text_of(const std::filesystem::path&);  // a small file, stripped; empty where this machine hasn't it
long long kilobytes(const char* file, const std::string& key);  // of a row of /proc, 0 without it

// jobs.cpp
void run(const std::string& name);  // job NAME.json of the working folder; leaves NAME.result

// keeper.cpp
void keep(const std::filesystem::path& folder, double lease);
void write(const std::filesystem::path& place, const std::string& text);  // whole at once
Failure unwritten(const std::filesystem::path& place);  // what to throw where errno tells why

}  // namespace edgeq
