// What the emulation's tests share.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

void test_runtime_api();

#define EXPECT(condition)                                                      \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                            \
    }                                                                          \
  } while (false)

// An array in device memory.
template <class T>
class Device {
 public:
  explicit Device(const std::vector<T>& values) : n_(values.size()) {
    EXPECT(cudaMalloc(reinterpret_cast<void**>(&p_), n_ * sizeof(T)) == cudaSuccess);
    set(values);
  }
  ~Device() { cudaFree(p_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* get() const { return p_; }
  void set(const std::vector<T>& values) {
    EXPECT(cudaMemcpy(p_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  std::vector<T> values() const {
    std::vector<T> values(n_);
    EXPECT(cudaMemcpy(values.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return values;
  }

 private:
  T* p_ = nullptr;
  size_t n_;
};

// What the process would say and end with, did it call f.
template <class F>
std::string death(F f) {
  int ends[2];
  EXPECT(pipe(ends) == 0);
  const pid_t child = fork();
  EXPECT(child >= 0);
  if (child == 0) {
    dup2(ends[1], 2);
    f();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) said.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  EXPECT(waitpid(child, &status, 0) == child);
  EXPECT(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);
  return said;
}

inline bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }
