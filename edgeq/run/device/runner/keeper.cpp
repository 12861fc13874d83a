// Runs each job-N.json that appears in the folder, in a process of its own, and leaves job-N.done; see agent.py.
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <thread>

#include "json.hpp"
#include "runner.hpp"

namespace edgeq {
namespace {

namespace fs = std::filesystem;

constexpr auto kWatch = std::chrono::milliseconds(50);
constexpr size_t kLog = 2000;  // bytes of a job's last words that go to the host

long long touched() {
  struct stat found {};
  if (stat("alive", &found)) return 0;
  return found.st_mtim.tv_sec * 1000000000LL + found.st_mtim.tv_nsec;
}

// The number of the first job that waits, 0 when none does.
int waiting() {
  int first = 0;
  for (auto& entry : fs::directory_iterator(".")) {
    fs::path path = entry.path();
    std::string name = path.stem().string();
    if (path.extension() != ".json" || name.compare(0, 4, "job-") != 0) continue;
    int job = std::atoi(name.c_str() + 4);
    if (!fs::exists(name + ".done") && (first == 0 || job < first)) first = job;
  }
  return first;
}

// A process of its own, whose memory holds nothing of other jobs.
pid_t start(const std::string& name, int lock) {
  pid_t child = fork();
  setpgid(child, child);  // on both sides, so that whoever comes first may end the group
  if (child) return child;
  close(lock);  // it is the keeper's, and must fall with it
  int log = open((name + ".log").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  dup2(log, STDOUT_FILENO);
  dup2(log, STDERR_FILENO);
  int status = 1;
  try {
    run(name);
    status = 0;
  } catch (const std::exception& fault) {
    std::cerr << fault.what() << std::endl;
  }
  _exit(status);
}

// Leave what the host waits for, whole at once.
void finish(const std::string& name, int status) {
  std::string log = text_of(name + ".log"), result = text_of(name + ".result");
  if (log.size() > kLog) log = log.substr(log.size() - kLog);
  for (char& one : log)
    if (one & 0x80) one = '?';  // cut anywhere, it may be no UTF-8
  int told = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
  write(name + ".done", object({{"status", std::to_string(told)}, {"log", in_quotes(log)},
                                {"result", result.empty() ? "null" : result}}));
}

}  // namespace

Failure unwritten(const fs::path& place) {
  bool full = errno == ENOSPC || errno == EDQUOT;
  return full ? Failure("disk", "the disk is full")
              : Failure("run", place.string() + " can't be written: " + std::strerror(errno));
}

void write(const fs::path& place, const std::string& text) {
  fs::path part = fs::path(place) += ".part";
  std::ofstream file(part, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw unwritten(part);
  fs::rename(part, place);
}

void keep(const fs::path& folder, double lease) {
  setsid();
  int lock = open("lock", O_RDWR | O_CREAT, 0600);
  if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB)) return;  // another keeps it
  std::string own = std::to_string(getpid());
  if (ftruncate(lock, 0) || ::write(lock, own.data(), own.size()) < 0) return;
  using Clock = std::chrono::steady_clock;
  long long seen = touched();
  auto since = Clock::now();
  std::string name;
  pid_t running = 0;
  auto forgotten = [&] { return std::chrono::duration<double>(Clock::now() - since).count() >= lease; };
  while (fs::exists("lock") && !fs::exists("stop") && !forgotten()) {
    if (touched() != seen) seen = touched(), since = Clock::now();
    int status = 0;
    if (running && waitpid(running, &status, WNOHANG) == running) finish(name, status), running = 0;
    if (int job = running ? 0 : waiting()) running = start(name = "job-" + std::to_string(job), lock);
    std::this_thread::sleep_for(kWatch);
  }
  if (running) kill(-running, SIGKILL), waitpid(running, nullptr, 0);
  fs::current_path("/");
  std::error_code ignored;  // what can't be removed was never ours
  fs::remove_all(folder, ignored);
}

}  // namespace edgeq
