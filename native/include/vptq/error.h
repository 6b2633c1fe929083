// Every error that a user can cause. A message is one line and names the file, the tensor or option, what was found
// and what was expected. The Python classes of the same names are in vptq_runtime/errors.py.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

namespace vptq {

struct Error : std::runtime_error {
  explicit Error(std::string message) : std::runtime_error(one_line(std::move(message))) {}

 private:
  // Names come from files: they may hold line breaks and other control characters.
  static std::string one_line(std::string message) {
    for (char& c : message)
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    return message;
  }
};

// A model file is missing, damaged, or contradicts itself.
struct FileError : Error {
  using Error::Error;
};

// The input is well formed but asks for something that is not supported.
struct UnsupportedError : Error {
  using Error::Error;
};

// An argument or option is out of range, or does not fit the model.
struct OptionError : Error {
  using Error::Error;
};

// The GPU or its driver has failed, or computes wrong numbers.
struct DeviceError : Error {
  using Error::Error;
};

// The machine has not the memory that was asked for.
struct OutOfMemoryError : Error {
  using Error::Error;
};

// An amount of memory, as messages have it.
inline std::string gib(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", bytes / (1 << 30));
  return text;
}

}  // namespace vptq
