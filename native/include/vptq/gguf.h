// A GGUF v3 file, mapped into memory. Everything is checked against the file's size before it is used.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "vptq/tensor.h"

namespace vptq {

struct GgufValue;
using GgufArray = std::vector<GgufValue>;

// Strings are views into the mapping.
struct GgufValue : std::variant<bool, uint64_t, int64_t, double, std::string_view, GgufArray> {
  using variant::variant;
};

// What is said of a file that vptq-convert has not written.
inline constexpr const char* kPlainGguf =
    "no VPTQ model (no key 'vptq.version'): run a plain GGUF with llama.cpp, or convert a VPTQ checkpoint with "
    "vptq-convert";

// A file mapped read-only; unmapped on destruction.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Gives back the memory of the pages that have been read; they are read again when they are needed again.
  void drop_pages() const;

 private:
  const std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

class GgufFile {
 public:
  // Throws FileError where the file is missing, truncated, of another kind or version, or points outside itself.
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return path_; }
  size_t bytes() const { return map_.bytes(); }
  void drop_pages() const { map_.drop_pages(); }
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::map<std::string, Tensor, std::less<>>& tensors() const { return tensors_; }

  const Tensor* find(std::string_view name) const;        // nullptr where there is none
  const GgufValue* find_key(std::string_view key) const;  // nullptr where there is none

 private:
  std::string path_;
  MappedFile map_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::map<std::string, Tensor, std::less<>> tensors_;
};

}  // namespace vptq
