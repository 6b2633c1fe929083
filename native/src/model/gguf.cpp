#include "vptq/gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "vptq/error.h"

namespace vptq {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are used in place and are little-endian");

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kVersion = 3;
constexpr size_t kMaxDims = 4;
constexpr uint64_t kMaxElements = 1 << 23;  // of all arrays together; a tokenizer of 2^18 tokens has some 2^20

// The numbers are GGUF's.
enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

size_t value_bytes(ValueType type) {
  switch (type) {
    case ValueType::u8:
    case ValueType::i8:
    case ValueType::boolean: return 1;
    case ValueType::u16:
    case ValueType::i16: return 2;
    case ValueType::u32:
    case ValueType::i32:
    case ValueType::f32: return 4;
    case ValueType::u64:
    case ValueType::i64:
    case ValueType::f64:
    case ValueType::string: return 8;  // of a string: its length, the least it takes
    case ValueType::array: return 12;  // its type and length
  }
  return 0;
}

// Reads forward through the header; never past the end of the file.
class Cursor {
 public:
  Cursor(const MappedFile& map, const std::string& path) : map_(map), path_(path) {}

  size_t position() const { return position_; }
  size_t remaining() const { return map_.bytes() - position_; }

  [[noreturn]] void fail(const std::string& what) const { throw FileError(path_ + ": " + what); }

  const std::byte* take(uint64_t n, const std::string& what) {
    if (n > remaining())
      fail("truncated: " + what + " needs " + std::to_string(n) + " bytes at offset " + std::to_string(position_) +
           ", the file has " + std::to_string(remaining()) + " more");
    const std::byte* at = map_.data() + position_;
    position_ += n;
    return at;
  }

  template <class T>
  T read(const std::string& what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }

  std::string_view read_string(const std::string& what) {
    const auto n = read<uint64_t>("the length of " + what);
    return {reinterpret_cast<const char*>(take(n, what)), n};
  }

  GgufValue read_value(ValueType type, const std::string& what) {
    switch (type) {
      case ValueType::u8: return uint64_t{read<uint8_t>(what)};
      case ValueType::u16: return uint64_t{read<uint16_t>(what)};
      case ValueType::u32: return uint64_t{read<uint32_t>(what)};
      case ValueType::u64: return read<uint64_t>(what);
      case ValueType::i8: return int64_t{read<int8_t>(what)};
      case ValueType::i16: return int64_t{read<int16_t>(what)};
      case ValueType::i32: return int64_t{read<int32_t>(what)};
      case ValueType::i64: return read<int64_t>(what);
      case ValueType::f32: return double{read<float>(what)};
      case ValueType::f64: return read<double>(what);
      case ValueType::boolean: return read<uint8_t>(what) != 0;
      case ValueType::string: return read_string(what);
      case ValueType::array: return read_array(what);
    }
    fail(what + " has value type " + std::to_string(static_cast<uint32_t>(type)) + ", expected 0 to 12");
  }

 private:
  GgufArray read_array(const std::string& what) {
    const auto type = static_cast<ValueType>(read<uint32_t>(what));
    const auto n = read<uint64_t>(what);
    if (type == ValueType::array) fail(what + " is an array of arrays, expected an array of plain values");
    const size_t least = value_bytes(type);
    if (least == 0)
      fail(what + " has element type " + std::to_string(static_cast<uint32_t>(type)) + ", expected 0 to 12");
    if (n > kMaxElements - n_elements_)
      fail(what + " has " + std::to_string(n) + " elements, expected at most " + std::to_string(kMaxElements) +
           " in all arrays of the file");
    n_elements_ += n;
    if (n > remaining() / least)
      fail("truncated: " + what + " has " + std::to_string(n) + " elements, the file has " +
           std::to_string(remaining()) + " more bytes");
    GgufArray array;
    array.reserve(n);
    for (uint64_t i = 0; i < n; ++i) array.push_back(read_value(type, what));
    return array;
  }

  const MappedFile& map_;
  const std::string& path_;
  size_t position_ = 0;
  uint64_t n_elements_ = 0;  // of all arrays so far
};

// The bytes of a tensor, or 0 where its type is not known or its size overflows.
uint64_t tensor_bytes(DType type, const std::vector<int64_t>& shape) {
  uint64_t n = 1;
  for (const int64_t d : shape)
    if (d <= 0 || __builtin_mul_overflow(n, uint64_t(d), &n)) return 0;
  const TypeLayout layout = layout_of(type);
  if (shape.back() % layout.block != 0) return 0;
  return __builtin_mul_overflow(n / layout.block, uint64_t(layout.block_bytes), &n) ? 0 : n;
}

struct TensorInfo {
  Tensor tensor;
  uint64_t offset;
};

TensorInfo read_tensor_info(Cursor& in, bool plain) {
  TensorInfo info;
  Tensor& t = info.tensor;
  t.name = in.read_string("a tensor's name");
  const std::string what = "tensor '" + t.name + "'";
  const auto n_dims = in.read<uint32_t>(what);
  if (n_dims < 1 || n_dims > kMaxDims)
    in.fail(what + " has " + std::to_string(n_dims) + " dimensions, expected 1 to " + std::to_string(kMaxDims));
  for (uint32_t i = 0; i < n_dims; ++i) t.shape.push_back(in.read<int64_t>(what));
  std::reverse(t.shape.begin(), t.shape.end());
  t.type = static_cast<DType>(in.read<uint32_t>(what));
  info.offset = in.read<uint64_t>(what);
  t.bytes = tensor_bytes(t.type, t.shape);
  if (t.bytes == 0)
    in.fail(what + " has type " + type_name(t.type) + " and shape " + shape_text(t.shape) + ", expected " +
            kMatrixTypes + " (Q: rows of whole blocks of 32), I16 or I32, and a possible shape" +
            (plain ? std::string("; ") + kPlainGguf : ""));
  return info;
}

uint64_t read_alignment(const std::map<std::string, GgufValue, std::less<>>& metadata, const Cursor& in) {
  const auto it = metadata.find("general.alignment");
  if (it == metadata.end()) return 32;
  const auto* value = std::get_if<uint64_t>(&it->second);
  if (!value || !std::has_single_bit(*value) || *value < 8 || *value > 65536)
    in.fail("key 'general.alignment' is not a power of two from 8 to 65536");
  return *value;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would wait for its writer
  if (fd < 0) throw FileError(path + ": cannot be opened: " + std::strerror(errno));
  struct stat status{};
  const bool regular = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  if (!regular || status.st_size == 0) {
    ::close(fd);
    throw FileError(path + (regular                   ? ": the file is empty, expected a GGUF file"
                            : S_ISDIR(status.st_mode) ? ": a directory, expected a GGUF file: vptq-convert makes one "
                                                        "of a checkpoint"
                                                      : ": not a regular file, expected a GGUF file"));
  }
  bytes_ = static_cast<size_t>(status.st_size);
  void* at = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  ::close(fd);
  if (at == MAP_FAILED) throw FileError(path + ": cannot be mapped: " + std::strerror(error));
  data_ = static_cast<const std::byte*>(at);
}

MappedFile::~MappedFile() { ::munmap(const_cast<std::byte*>(data_), bytes_); }

void MappedFile::drop_pages() const { ::madvise(const_cast<std::byte*>(data_), bytes_, MADV_DONTNEED); }

GgufFile::GgufFile(const std::string& path) : path_(path), map_(path) {
  Cursor in(map_, path_);
  if (in.remaining() < 4 || in.read<uint32_t>("the magic") != kMagic)
    in.fail("not a GGUF file: wrong magic; vptq-convert makes one of a checkpoint");
  const auto version = in.read<uint32_t>("the version");
  if (version != kVersion)
    in.fail("GGUF version " + std::to_string(version) + ", expected " + std::to_string(kVersion));
  const auto n_tensors = in.read<uint64_t>("the number of tensors");
  const auto n_keys = in.read<uint64_t>("the number of keys");

  for (uint64_t i = 0; i < n_keys; ++i) {
    const std::string key(in.read_string("a key"));
    const std::string what = "key '" + key + "'";
    const auto type = static_cast<ValueType>(in.read<uint32_t>(what));
    if (!metadata_.emplace(key, in.read_value(type, what)).second) in.fail(what + " stands twice");
  }

  std::vector<TensorInfo> infos;
  for (uint64_t i = 0; i < n_tensors; ++i) infos.push_back(read_tensor_info(in, !find_key("vptq.version")));

  const uint64_t alignment = read_alignment(metadata_, in);
  const uint64_t start = (in.position() + alignment - 1) / alignment * alignment;
  std::sort(infos.begin(), infos.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  uint64_t end = 0;  // of the tensor before, from `start`
  const std::string* before = nullptr;
  for (auto& [tensor, offset] : infos) {
    const std::string what = "tensor '" + tensor.name + "'";
    if (offset % alignment != 0)
      in.fail(what + " is at offset " + std::to_string(offset) + ", expected a multiple of " +
              std::to_string(alignment));
    if (start > map_.bytes() || offset > map_.bytes() - start || tensor.bytes > map_.bytes() - start - offset)
      in.fail(what + " needs " + std::to_string(tensor.bytes) + " bytes at offset " + std::to_string(offset) +
              " of the data, which lie outside the file of " + std::to_string(map_.bytes()) + " bytes");
    if (offset < end) in.fail(what + " overlaps tensor '" + *before + "'");
    end = offset + tensor.bytes;
    tensor.data = map_.data() + start + offset;
    const auto [it, inserted] = tensors_.emplace(tensor.name, tensor);
    if (!inserted) in.fail(what + " stands twice");
    before = &it->first;
  }
}

const Tensor* GgufFile::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const GgufValue* GgufFile::find_key(std::string_view key) const {
  const auto it = metadata_.find(key);
  return it == metadata_.end() ? nullptr : &it->second;
}

}  // namespace vptq
