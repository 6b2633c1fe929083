#include "cpu/machine.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace vptq::cpu {
namespace {

// The number that a one-line file starts with; -1 where there is none ("max", no such file).
int64_t read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value;
  return file >> value ? value : -1;
}

}  // namespace

int physical_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    // A core is the list of its hyperthreads. Its core_id will not do: on ARM each cluster counts from 0.
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const std::string number = std::to_string(cpu);
      std::ifstream file("/sys/devices/system/cpu/cpu" + number + "/topology/thread_siblings_list");
      std::string threads;
      cores.insert(file >> threads ? threads : number);
    }
    if (!cores.empty()) return static_cast<int>(cores.size());
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

size_t available_memory() {
  size_t available = std::numeric_limits<size_t>::max();
#if defined(__linux__)
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  for (uint64_t kib; meminfo >> key >> kib;) {
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") available = kib * 1024;
  }
  const int64_t limit = read_number("/sys/fs/cgroup/memory.max"), used = read_number("/sys/fs/cgroup/memory.current");
  if (limit >= 0 && used >= 0) {
    int64_t file_pages = 0;  // mapped files and page cache count as used, but can be dropped; files in memory cannot
    std::ifstream stat("/sys/fs/cgroup/memory.stat");
    for (int64_t value; stat >> key >> value;) {
      if (key == "file") file_pages += value;
      if (key == "shmem") file_pages -= value;  // "file" holds these, too
    }
    available = std::min(available, static_cast<size_t>(std::max<int64_t>(limit - used + file_pages, 0)));
  }
#elif defined(_SC_PHYS_PAGES)
  available = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE));
#endif
  return available;
}

void return_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace vptq::cpu
